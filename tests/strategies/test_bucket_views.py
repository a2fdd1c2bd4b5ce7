"""Gradients that live in DDP's buckets: exact, in one place for the whole run, None if unused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import Trainer
from strategies import DDPStrategy
from tests.kit.processes import on_processes, run
from tests.kit.reference import Branches, Regression, Watch, parameters
from tests.kit.table import EPOCHS, TAILS, N, expected


class Places(Watch):
    """Where the gradients are, after each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[int, ...]] = set()

    def on_update_end(self, trainer: Any) -> None:
        super().on_update_end(trainer)
        self.zeros = all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
        self.places.add(tuple(p.grad.data_ptr() for p in trainer.model.parameters()))


class Noting(DDPStrategy):
    _watch: Places

    def backward(self, loss: Any, scale: Any) -> None:
        super().backward(loss, scale)
        self._watch.places.add(tuple(p.grad.data_ptr() for p in self._parameters))  # type: ignore[union-attr]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("P", "K"), [(1, 2), (2, 1), (3, 7)])
def test_gradients_in_buckets_equal_one_big_batch_and_never_move(P: int, K: int, tail: str) -> None:
    samples = TAILS[tail](P * N * K)

    @on_processes(P)
    def results() -> Any:
        strategy = Noting(gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
        strategy._watch = watch = Places()
        trainer = Trainer(strategy, N, K, max_epochs=EPOCHS, shuffle=False, callbacks=watch)
        trainer.fit(Regression(samples))
        return parameters(trainer.model), len(watch.places), watch.zeros

    for found, places, are_zero in results:
        torch.testing.assert_close(found, expected(samples, P * N * K), rtol=0, atol=1e-12)
        assert places == 1  # from the first micro-batch of the run on
        assert are_zero


def test_parameters_that_nobody_used_are_not_decayed() -> None:
    """Neither those that are never used, nor in an update those that others use."""
    alone = Trainer("single", micro_batch_size=2, accumulate_grad_batches=2, max_epochs=3, shuffle=False)
    task = Regression(23, model=Branches)
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    alone.fit(task)

    @on_processes(2)
    def results() -> Any:
        strategy = DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=True)
        trainer = Trainer(strategy, micro_batch_size=2, max_epochs=3, shuffle=False)
        task = Regression(23, model=Branches)
        task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
        trainer.fit(task)
        assert not trainer.optimizer.state.keys() & set(trainer.model.never.parameters())  # type: ignore[union-attr, operator]
        return parameters(trainer.model)

    for found in results:
        torch.testing.assert_close(found, parameters(alone.model), rtol=0, atol=1e-9)


def train_skipped(views: bool) -> Any:
    """A window of NaN leaves no NaN behind, although gradients stay where they are."""
    task = Regression(40)
    task.y[9] = torch.nan
    trainer = Trainer(DDPStrategy(gradient_as_bucket_view=views), N, 2, max_epochs=2, shuffle=False)
    trainer.fit(task)
    return trainer.skipped, parameters(trainer.model)


def test_a_skipped_update_leaves_no_trace() -> None:
    for (skipped, found), (_, exact) in zip(run(2, train_skipped, True), run(2, train_skipped, False), strict=True):
        assert skipped == 2
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
