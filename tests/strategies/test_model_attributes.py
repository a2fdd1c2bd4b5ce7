"""`loss()` may use the methods and attributes of the model that it is given, under every strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Loss, Trainer
from strategies import DDPStrategy, DPStrategy, Strategy
from strategies.registry import find
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 7).double(), nn.Linear(7, 1).double()
        self.scale = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(1, dtype=torch.float64))
        self.factor = 1.0
        self.dim = self.chunks = 7  # names that wrappers have, too

    @property
    def temperature(self) -> float:
        return self.factor

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.factor = value

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) * self.factor * (self.dim + self.chunks) / 14

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x)) + self.shift  # type: ignore[no-any-return]


calls: list[int] = []


def loss_of(how: str, model: Any, x: Tensor) -> Tensor:
    if how == "method":
        return model.head(model.encode(x)) * model.scale  # type: ignore[no-any-return]
    if how == "forward and method":
        return (model(x) + model.encode(x).sum(1, keepdim=True)) * model.scale  # type: ignore[no-any-return]
    if how == "without a gradient first":  # pseudo-labels
        with torch.no_grad():
            target = model(x).sign()
        return (model.head(model.encode(x)) - target) * model.scale  # type: ignore[no-any-return]
    if how == "in turn":  # a call of the model and a call of its methods, which say the same
        calls.append(1)
        called = model(x) if len(calls) % 2 else model.head(model.encode(x)) + model.shift
        return called * model.scale  # type: ignore[no-any-return]
    if how == "property":
        model.temperature = 3.0
    if how == "set":
        model.factor = 3.0
        model.shift = torch.full((1,), 5.0, dtype=torch.float64)
    return model(x) * model.scale  # type: ignore[no-any-return]


class Uses(Regression):
    def __init__(self, how: str) -> None:
        super().__init__(30, lr=0.01, model=Encoder)
        self.how = how

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(loss_of(self.how, model, batch[0]), batch[1])


def fit(how: str, strategy: Strategy, N: int) -> Tensor:
    trainer = Trainer(strategy, micro_batch_size=N, accumulate_grad_batches=2, max_epochs=2, shuffle=False)
    trainer.fit(Uses(how))
    return torch.cat([getattr(p, "full_tensor", p.detach)().flatten() for p in trainer.model.parameters()])


STRATEGIES = {
    "ddp": DDPStrategy(),
    "ddp, unused": DDPStrategy(find_unused_parameters=True),
    "ddp, views": DDPStrategy(gradient_as_bucket_view=True),
    "dp": DPStrategy(2, "cpu"),
    "fsdp": find("fsdp")(),
}


HOW = ["method", "attribute", "forward and method", "set", "property", "without a gradient first", "in turn"]


CASES = [(name, how) for name in STRATEGIES for how in HOW if name != "fsdp" or how not in HOW[-2:]]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_methods_and_attributes_of_the_model_work(name: str, how: str) -> None:
    reference = fit(how, find("single")(), 4)
    P = 1 if name == "dp" else 2
    if (name, how) == ("fsdp", "method"):  # FSDP gathers for forward alone
        with pytest.raises(ChildError, match=r"mixed torch\.Tensor and DTensor"):
            run(P, fit, how, STRATEGIES[name], 2, seconds=30)
        return
    for found in run(P, fit, how, STRATEGIES[name], 4 // P):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


class Independent(Regression):
    """On process 1, the loss of a micro-batch does not depend on the model that it has called."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        if torch.distributed.get_rank() == 1:
            return Loss(torch.zeros((), requires_grad=True) * 1, 0)
        return Loss(output.sum(), len(output))


@pytest.mark.parametrize("find_unused", [False, True])
def test_a_loss_that_does_not_depend_on_the_model_is_refused(find_unused: bool) -> None:
    def fit_independent() -> None:
        strategy = DDPStrategy(find_unused_parameters=find_unused)
        Trainer(strategy, micro_batch_size=4, accumulate_grad_batches=2, max_epochs=1).fit(Independent(32))

    with pytest.raises(ChildError, match=r"return Loss\(0 \* output.sum\(\), 0\)") as raised:
        run(2, fit_independent, seconds=20)
    assert "the loss was not computed with the `model`" in raised.value.errors[0]


class Layers(Regression):
    def loss(self, model: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(model.encode(batch[0]), batch[1])


def test_a_pipeline_says_how_its_model_is_called() -> None:
    def fit_pipeline() -> None:
        Trainer("pipeline", micro_batch_size=4, accumulate_grad_batches=4, max_epochs=1).fit(Layers(32))

    with pytest.raises(ChildError, match=r"model\.encode: the model of a pipeline is in parts.* Call it as model\(x\)"):
        run(2, fit_pipeline, seconds=30)
