"""Terms and open windows that would train wrong: one clear error, on all processes."""

from __future__ import annotations

import atexit
import math
import re
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from engine import Accumulator, Loss, Trainer
from strategies import PipelineStrategy, find
from tests.kit.processes import ChildError, run
from tests.kit.reference import data, mlp
from tests.kit.terms import Groups, GroupsTwice, fit

X, Y = data(8)


class Wrong(Groups):
    """Makes a mistake on process `rank`, most of them in the second window."""

    def __init__(self, mistake: str, rank: int) -> None:
        super().__init__(24)
        self.mistake, self.rank, self.calls = mistake, rank, 0

    def configure_model(self) -> Any:
        self.errs = torch.distributed.get_rank() == self.rank
        return super().configure_model()

    def weights(self, batch: Any) -> Any:
        found = super().weights(batch)
        if not self.errs:
            return found
        self.calls += 1
        if self.mistake == "other names at once":
            return {f"{name}s": weight for name, weight in found.items()}
        if self.mistake == "a name of records":
            return {"lr": 1, **found}
        if self.calls > 2:
            name = next(iter(found))
            if self.mistake == "other names later":
                return {f"{name}s": weight for name, weight in found.items()}
            if self.mistake == "negative":
                return {**found, name: -1}
            if self.mistake == "NaN":
                return {**found, name: torch.tensor(math.nan)}
            if self.mistake == "data":
                raise OSError("the disk is gone")
        return found

    def loss(self, model: Any, batch: Any) -> Any:
        terms = {
            name: Loss(value, Groups.weights(self, batch)[name]) for name, value in self.sums(model, batch).items()
        }
        if self.errs and self.calls > 2:
            if self.mistake == "another count":
                terms["policy"] = Loss(terms["policy"].sum, 1)
            if self.mistake == "a count where none was":
                terms["value"] = Loss(terms["value"].sum, terms["value"].weight + 1)
            if self.mistake == "a term too few":
                del terms["value"]
            if self.mistake == "no grad":
                terms["value"] = Loss(terms["value"].sum.detach(), terms["value"].weight)
            if self.mistake == "half":
                terms["value"] = Loss(terms["value"].sum.half(), terms["value"].weight)
            if self.mistake == "one loss":
                return terms["policy"]
        return terms


TERMS = {
    "other names at once": "terms with different names in their first window",
    "a name of records": "'lr'.*: records, or tables made of them, have a field of that name",
    "other names later": r"weights\(\) returned .*'policys'.*: expected finite numbers .*terms \['policy'",
    "negative": r"weights\(\) returned {'policy': -1.*: expected finite numbers of at least 0",
    "NaN": r"weights\(\) returned {'policy': tensor\(nan\).*: expected finite numbers of at least 0",
    "data": "the disk is gone",
    "another count": r"term 'policy': weights\(\) counted .* in update 1, but its losses have weight",
    "a count where none was": r"term 'value': weights\(\) counted .* in update 1, but its losses have weight",
    "a term too few": r"loss\(\) returned the terms \['penalty', 'policy'\]: expected",
    "no grad": "term 'value' is torch.float64, requires_grad=False: expected float32 or wider, computed from the model",
    "half": "term 'value' is torch.float16, requires_grad=True: expected float32 or wider",
    "one loss": r"loss\(\) returned Loss: expected its terms, a dict of Loss\(sum, weight\) by name",
}


@pytest.mark.parametrize("mistake", TERMS)
def test_terms(mistake: str) -> None:
    with pytest.raises(ChildError) as raised:
        run(2, fit, Wrong(mistake, rank=0), "ddp", 2, seconds=30)
    assert len(raised.value.errors) == 2
    for at, error in raised.value.errors.items():
        assert re.search(TERMS[mistake], error), error
        assert at == 0 or "process 0 failed" in error or "lr" in error or " names" in error or "counted" in error


class NoWeights(Groups):
    weights = GroupsTwice.weights

    def loss(self, model: Any, batch: Any) -> Any:
        return GroupsTwice.loss(self, model, batch)  # type: ignore[arg-type]


class Negative(GroupsTwice):
    def loss(self, model: Any, batch: Any) -> Any:
        terms = super().loss(model, batch)
        weight = torch.where(batch[0][0, 0, 0] == self.x[3, 0, 0], -1, 50)
        return {**terms, "policy": Loss(terms["policy"].sum, weight)}


def test_terms_that_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"loss\(\) returned dict.*For several terms count weights\(\) too, or use"):
        fit(NoWeights(9), "single", 1)
    with pytest.raises(ValueError, match="term 'policy' has a weight that is negative or not finite"):
        fit(Negative(12), "single", 4)
    for options in ({"strategy": PipelineStrategy()}, {"prefetch_to_device": True}):
        K = 4 if "strategy" in options else 1
        with pytest.raises(ValueError, match=r"Groups has weights\(\): expected a Task whose batches wait on the host"):
            Trainer(accumulate_grad_batches=K, max_epochs=1, **options).fit(Groups(9))


WINDOWS = {
    "open twice": "a window ended without window.update()",
    "open in a loop": "a window ended without window.update()",
    "state": "a window ended without window.update()",
    "no backward": "update() was called without a backward(), on any process",
    "update twice": "window.update() was called after update() or drop()",
    "drop after update": "window.drop() was called after update() or drop()",
    "backward after update": "window.backward() was called after update() or drop()",
    "a mean": "the samples of this call are unknown",
    "a batch": "loss() returned tuple: expected a 0-dim tensor, or Loss(sum, weight)",
    "rows": "the loss has shape (8, 1): expected a 0-dim tensor",
    "no grad": "the loss does not require grad",
    "terms": "For several terms count weights() too",
    "terms of other weights": "term 'a': weights() counted",
    "a gradient of before": "has a gradient before the window's first backward",
}


SYMMETRICAL = ("no backward", "terms of other weights")
"""Found by all processes alike."""


def drive(name: str, mistake: str, rank: int | None) -> int:
    strategy = find(name)()
    strategy.setup()
    net = strategy.prepare(mlp())
    accumulator = Accumulator(strategy, net, torch.optim.SGD(net.parameters(), lr=0.1), TensorDataset(X, Y), 4)
    errs = rank in (None, strategy.rank)
    wrong = mistake if errs else ""
    loss = lambda: Loss((net(X) - Y).square().sum(), 8)  # noqa: E731
    for _ in range(2):
        window = accumulator.open()
        window.backward(loss())
        window.update()
    if wrong == "a gradient of before":
        loss().sum.backward()
    window = accumulator.open(weights={"a": 4} if mistake == "terms of other weights" else None)
    if wrong == "open twice":
        accumulator.open()
    if wrong == "open in a loop":
        next(iter(accumulator.windows(0)))
    if wrong == "state":
        accumulator.state_dict()
    given = {
        "a mean": lambda: loss().sum / 8,
        "a batch": lambda: (X, Y),
        "rows": lambda: (net(X) - Y).square(),
        "no grad": lambda: Loss(loss().sum.detach(), 8),
        "terms": lambda: {"a": loss()},
        "terms of other weights": lambda: {"a": loss()},
    }
    if mistake == "terms of other weights":
        window.backward({"a": loss() if errs else Loss(loss().sum, 4)})
    elif mistake != "no backward":
        window.backward(given.get(wrong, loss)(), samples=8 if wrong == "rows" else None)
    window.update()
    if wrong == "update twice":
        window.update()
    if wrong == "drop after update":
        window.drop()
    if wrong == "backward after update":
        window.backward(loss())
    if mistake:  # the others find out in their next window
        window = accumulator.open()
        window.backward(loss())
        window.update()
    return accumulator.update


@pytest.mark.parametrize("mistake", WINDOWS)
def test_windows(mistake: str) -> None:
    with pytest.raises(ValueError, match=re.escape(WINDOWS[mistake])):
        drive("single", mistake, None)


@pytest.mark.parametrize("mistake", ["open twice", "update twice", "a mean", "a gradient of before", *SYMMETRICAL])
def test_windows_of_two_processes(mistake: str) -> None:
    with pytest.raises(ChildError) as raised:
        run(2, drive, "ddp", mistake, 1, seconds=30)
    assert len(raised.value.errors) == 2
    for at, error in raised.value.errors.items():
        assert WINDOWS[mistake] in error
        assert "process 1 failed" in error or at == 1 or mistake in SYMMETRICAL


def test_fsdp_refuses_open_windows() -> None:
    def open_on_fsdp() -> None:
        strategy = find("fsdp")()
        strategy.setup()
        net = strategy.prepare(mlp())
        Accumulator(strategy, net, torch.optim.SGD(net.parameters(), lr=0.1)).open()

    with pytest.raises(ChildError, match=r"strategy 'fsdp' communicates in each forward.*Use DDPStrategy"):
        run(1, open_on_fsdp)


def test_a_window_that_is_left_open_is_reported() -> None:
    def leave_open() -> None:
        at_exit: list[Any] = []
        atexit.register = at_exit.append  # type: ignore[assignment]
        strategy = find("ddp")()
        strategy.setup()
        net = strategy.prepare(mlp())
        window = Accumulator(strategy, net, torch.optim.SGD(net.parameters(), lr=0.1)).open()
        window.backward(Loss(net(X).sum(), 8))
        if strategy.rank == 0:
            window.update()
        for function in at_exit:
            function()

    with pytest.raises(ChildError) as raised:
        run(2, leave_open, seconds=20)
    problem = "a window was left open: 1 calls of backward() count for nothing. Call update() or drop()."
    assert f"process 1 failed: {problem}" in raised.value.errors[0]


def test_a_window_that_could_not_open_is_not_left_open() -> None:
    strategy = find("single")("cpu")
    model = strategy.prepare(mlp())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accumulator, before = Accumulator(strategy, model, optimizer), atexit._ncallbacks()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="the parameters changed during training"):
        accumulator.open()
    assert atexit._ncallbacks() == before
