"""Memory that runs out on a stream: it is read again from the window's start, and its micro-batches are cut."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Loss, Trainer
from engine.errors import UserError
from engine.task import Task
from tests.kit.hungry import DDP, DP, Hungry, Single
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Watch, big_batch_run, parameters
from tests.kit.streams import Stream, Streamed, deal, windows_of

K, SIZES = 3, [6, 4, 5]
WAYS = [(1, Single), (1, DP), (2, DDP), (3, DDP)]
EPOCHS = 2


class HungryStream(Hungry, Streamed):
    def __init__(self, P: int, at: Any, weighs: bool = False) -> None:
        lengths = [8, 6, 2][:P]  # a process without data in the last windows
        self.deal = deal(lengths, SIZES)
        super().__init__(sum(len(rows) for own in self.deal for rows in own), self.deal)
        self.at, self.weighs = at, weighs

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.eat(model)
        x, (y, index) = batch["x"], batch["nested"]
        if not self.weighs:
            return super().loss(model, batch)
        self.seen.append(index.tolist())
        return Loss(((model(x) - y) ** 2).sum(), len(x))


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize(("P", "strategy"), WAYS)
def test_the_same_samples_make_the_same_update(P: int, strategy: Any, weighs: bool) -> None:
    at = {0: ("forward", 0), 1: ("middle", P // 3), 3: ("last", P // 2)}
    task = HungryStream(P, at)
    windows = windows_of(task.deal, K)
    expected = big_batch_run(task, [windows] * EPOCHS)

    @on_processes(P)
    def results() -> Any:
        watch, task = Watch(), HungryStream(P, at, weighs)
        settings: dict[str, Any] = {"accumulate_grad_batches": K, "max_epochs": EPOCHS}
        trainer = Trainer(strategy(), callbacks=watch, keep_last_checkpoints=9, **settings)
        trainer.fit(task)
        sizes = [record.get("micro_batch_size") for record in watch.records]
        return parameters(trainer.model), sizes, [record["effective_batch"] for record in watch.records]

    for found, sizes, effective in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert sizes == [3, 2, 2, 1, 1, 1]
        assert effective == [len(rows) for rows in windows] * EPOCHS


def killed(P: int, folder: str, updates: Any, dies: bool) -> Any:
    class Dies(Callback):
        def on_update_end(self, trainer: Any) -> None:
            if trainer.update == 4 and dies:
                signal.raise_signal(signal.SIGKILL)

    task = HungryStream(P, {1: ("last", P - 1)} if updates is None else {})
    settings: dict[str, Any] = {"accumulate_grad_batches": K, "max_epochs": EPOCHS, "save_every_n_updates": 1}
    trainer = Trainer(DDP(), callbacks=Dies(), run_dir=folder, **settings)
    trainer.fit(task)
    return parameters(trainer.model), trainer.state.stream_micro_batch_size


@pytest.mark.parametrize("P", [1, 2])
def test_a_run_that_is_killed_after_it_is_the_run_that_was_not(P: int, tmp_path: Path) -> None:
    whole = run(P, killed, P, str(tmp_path / "whole"), None, False)
    with pytest.raises(ChildError):
        run(P, killed, P, str(tmp_path / "parts"), None, True)
    for (a, size), (b, other) in zip(whole, run(P, killed, P, str(tmp_path / "parts"), 0, False), strict=True):
        assert torch.equal(a, b)
        assert size == other == 3


class Once(Streamed):
    """A generator, which cannot be read again."""

    def train_data(self) -> Iterator[Any]:
        return iter(super().train_data())


class Odd(Streamed):
    """Micro-batches with a part that has no rows."""

    def train_data(self) -> Any:
        class Scaled(Stream):
            def __iter__(self) -> Iterator[Any]:
                for batch in super().__iter__():
                    yield {**batch, "scale": torch.tensor(2.0)}

        return Scaled(self, self.pieces[0])


class Cuts(Odd):
    def split(self, batch: Any, size: int) -> Any:
        scale = batch.pop("scale")
        return [{**piece, "scale": scale} for piece in super().split(batch, size)]


class Loses(Odd):
    def split(self, batch: Any, size: int) -> Any:
        batch.pop("scale")
        return super().split(batch, size)[:-1]


class Pairs(Streamed):
    """Micro-batches with a part that has two rows for each sample: who counts them does not know their samples."""

    def train_data(self) -> Any:
        class Paired(Stream):
            def __iter__(self) -> Iterator[Any]:
                for batch in super().__iter__():
                    yield {**batch, "pairs": torch.zeros(2 * len(batch["x"]))}

        return Paired(self, self.pieces[0])

    def split(self, batch: Any, size: int) -> Any:
        pairs = batch.pop("pairs").split(2 * size)
        return [{**piece, "pairs": own} for piece, own in zip(super().split(batch, size), pairs, strict=True)]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (Pairs, UserError, "is a mean over an unknown number of samples"),
        (Once, torch.OutOfMemoryError, "as a test wants it"),
        (Odd, UserError, r"it holds a Tensor of shape \(\). Give HungryTask a method split\(self, batch, size\)"),
        (Loses, UserError, r"split\(\) made pieces of \[3\] samples of a micro-batch of 6: expected all of them"),
        (Cuts, None, ""),
    ],
)
def test_what_cannot_be_cut_ends_the_run(kind: type[Task], error: Any, text: str) -> None:
    class HungryTask(Hungry, kind):  # type: ignore[misc, valid-type]
        def loss(self, model: nn.Module, batch: Any) -> Any:
            self.eat(model)
            return super().loss(model, batch)

    task = HungryTask(12, [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]])
    task.at = {0: ("forward" if kind is Pairs else "middle", 0)}  # the others' losses are refused before
    trainer = Trainer(Single(), accumulate_grad_batches=2, max_epochs=1)
    if error is None:
        trainer.fit(task)
        expected = big_batch_run(Regression(12), [[range(12)]])
        torch.testing.assert_close(parameters(trainer.model), expected, rtol=0, atol=1e-12)
    else:
        with pytest.raises(error, match=text):
            trainer.fit(task)
