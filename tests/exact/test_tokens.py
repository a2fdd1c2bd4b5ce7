"""Losses with weights of their own: padded tokens, masked micro-batches, late correction."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from engine import Loss, Trainer
from engine.order import within_budget
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Watch, in_order, parameters
from tests.kit.tokens import Sequences, big_batch


def fit(task: Sequences, K: int, max_norm: float | None) -> Any:
    watch = Watch()
    trainer = Trainer(
        "ddp",
        micro_batch_size=3,
        accumulate_grad_batches=K,
        max_epochs=3,
        shuffle=False,
        gradient_clip_norm=max_norm,
        callbacks=watch,
    )
    trainer.fit(task)
    return parameters(trainer.model), watch.records


FORMS = [(as_tensor, max_norm) for as_tensor in (True, False) for max_norm in (None, 0.2)]


def masked(as_tensor: bool) -> Sequences:
    return Sequences(43, masked=range(12, 25), as_tensor=as_tensor)


@pytest.mark.parametrize(("P", "K"), [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (4, 1), (4, 2)])
def test_tokens_weigh_alike_wherever_they_are(P: int, K: int) -> None:
    windows = in_order(43, P * 3 * K)

    @on_processes(P)
    def by_rank() -> Any:
        return [fit(masked(as_tensor), K, max_norm) for as_tensor, max_norm in FORMS]

    for (as_tensor, max_norm), *replicas in zip(FORMS, *by_rank, strict=True):
        task = masked(as_tensor)
        reference, losses = big_batch(task, windows, 3, max_norm)
        for found, records in replicas:
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
            assert [r["weight"] for r in records[: len(windows)]] == [task.valid[list(w)].sum() for w in windows]
            torch.testing.assert_close([r["loss"] for r in records], losses, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("P", [1, 2])
def test_a_window_of_weight_zero_is_a_skipped_update(P: int) -> None:
    for found, records in run(P, fit, Sequences(12, masked=range(6)), 6 // (3 * P), None):
        assert [r["skipped"] for r in records] == [1, 1, 2, 2, 3, 3]
        assert torch.isfinite(found).all()


class Weighs(Sequences):
    weight: Any = -1.0

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return Loss(super().loss(model, batch).sum, self.weight)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan)])
@pytest.mark.parametrize("P", [1, 2])
def test_a_weight_that_is_none_is_an_error_on_all_processes(P: int, weight: Any) -> None:
    def fit_weight() -> None:
        task = Weighs(12)
        task.weight = weight
        fit(task, 2, None)

    with pytest.raises(ChildError, match="expected a finite number of at least 0") as raised:
        run(P, fit_weight, seconds=20)
    assert len(raised.value.errors) == P


def test_one_negative_weight_is_found_among_many() -> None:
    task = Sequences(12)
    base = task.loss
    task.loss = lambda model, batch: Loss(
        base(model, batch).sum, torch.where(batch[0][0, 0] == task.tokens[3, 0], -1, 5)
    )  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="expected a finite number of at least 0"):
        Trainer("single", micro_batch_size=3, accumulate_grad_batches=4, max_epochs=1, shuffle=False).fit(task)


ODD = 2**24 + 1
"""The first whole number that float32 does not have."""
WEIGHTS = {
    "int64": torch.tensor(ODD),
    "int32": torch.tensor(ODD, dtype=torch.int32),
    "float32": torch.tensor(1.0 + 2**-23),
    "int": ODD,
    "numpy float32": numpy.float32(1.0 + 2**-23),
    "numpy int64": numpy.int64(ODD),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("P", [1, 2])
def test_weights_are_summed_exactly(P: int, weight: Any) -> None:
    task = Weighs(36)
    task.weight = weight
    for _, records in run(P, fit, task, 12 // P, 1e9):
        assert records[0]["weight"] == 12 * Fraction(weight.item() if hasattr(weight, "item") else weight)


class Grouped(Sequences):
    """Micro-batches of very different numbers of samples, each padded to at most 60 tokens."""

    def order(self, epoch: int) -> Any:
        return within_budget((self.valid.sum(1) + 1).tolist(), 60, seed=0)(epoch)


@pytest.mark.parametrize(("P", "K"), [(1, 4), (2, 2), (3, 2)])
def test_micro_batches_of_a_token_budget(P: int, K: int) -> None:
    task = Grouped(43)
    windows, sizes = [], []
    for epoch in range(3):
        groups = task.order(epoch)
        for start in range(0, len(groups), P * K):
            windows.append([i for group in groups[start : start + P * K] for i in group])
            sizes.append(len(windows[-1]))
    reference, losses = big_batch(task, windows, 1, None)

    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        trainer = Trainer("ddp", micro_batch_size=1, accumulate_grad_batches=K, max_epochs=3, callbacks=watch)
        trainer.fit(task)
        return parameters(trainer.model), watch.records

    for found, records in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        torch.testing.assert_close([r["loss"] for r in records], losses, rtol=1e-12, atol=0)
        assert [r["effective_batch"] for r in records] == sizes
