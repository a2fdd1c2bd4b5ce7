"""Mistakes in a loop of your own: errors on all processes, even if one process makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from engine import Accumulator
from strategies.registry import find
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, mlp

MISTAKES = {
    "backward twice": "backward was called twice for a micro-batch, or for none",
    "backward twice at the end": "backward was called twice for a micro-batch, or for none",
    "no backward": "backward was not called for a micro-batch",
    "no backward at the end": "backward was not called for a micro-batch",
    "break": "backward was not called for the window's last micro-batch",
    "update twice": "window.update() was called twice",
    "no update": "a window ended without window.update()",
    "iterate twice": "a window was iterated over twice",
    "data": "the disk is gone",
}


class Breaks(TensorDataset):
    breaks = False

    def __getitem__(self, index: int) -> Any:
        if self.breaks and index >= 12:  # in the second window
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def loop(name: str, mistake: str, rank: int | None) -> int:
    task, strategy = Regression(48), find(name)()
    strategy.setup()
    model = strategy.prepare(mlp())
    errs = rank in (None, strategy.rank)
    data = Breaks(*task.train_data().tensors)
    data.breaks = errs and mistake == "data"
    N = 4 // strategy.data_parallel_size
    accumulator = Accumulator(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), data, N, 3, shuffle=False)
    for window in accumulator.windows(0):
        errs = rank in (None, strategy.rank) and accumulator.update == 1
        for index, batch in enumerate(window):
            wrong = mistake if errs and index == (2 if mistake.endswith("end") else 1) else ""
            if wrong == "break":
                break
            if wrong.startswith("no backward"):
                continue
            window.backward(loss := task.loss(model, batch))
            if wrong.startswith("backward twice"):
                window.backward(loss)
        if errs and mistake == "iterate twice":
            list(window)
        if not errs or mistake != "no update":
            window.update()
        if errs and mistake == "update twice":
            window.update()
    return accumulator.update


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("name", "P", "rank"), [("single", 1, None), ("ddp", 2, 0), ("ddp", 2, None), ("fsdp", 2, 1)])
def test_a_mistake_is_an_error_on_all_processes(name: str, P: int, rank: int | None, mistake: str) -> None:
    assert run(P, loop, name, "", rank) == [4] * P
    with pytest.raises(ChildError) as raised:
        run(P, loop, name, mistake, rank, seconds=30)
    assert len(raised.value.errors) == P
    for at, error in raised.value.errors.items():
        if name == "fsdp" and mistake == "update twice" and at != rank:
            assert "gloo" in error  # met in the forward of one's own: nothing of Tally's is around it
        else:
            assert MISTAKES[mistake] in error
            assert f"process {rank} failed" in error or rank in (None, at)


def test_a_model_that_was_never_prepared_is_named() -> None:
    model = mlp()
    for name in ("single", "dp", "ddp"):
        with pytest.raises(ValueError, match=r"no model yet. Call strategy.setup\(\), then strategy.prepare"):
            Accumulator(find(name)(), model, torch.optim.SGD(model.parameters(), lr=0.1), [*range(4)], 2)
