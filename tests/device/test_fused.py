"""A task's fused optimizer: the update of a plain step, up to rounding, also after a resume."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Trainer
from tests.kit.processes import run
from tests.kit.reference import Regression, in_order, parameters

SAMPLES, N, K, EPOCHS = 24, 2, 2, 3


class Optimized(Regression):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        super().__init__(SAMPLES)
        self.optimizer, self.options = optimizer, options

    def configure_optimizer(self, model: Any) -> Any:
        groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2], model[4])]
        return self.optimizer(groups, lr=0.01, **self.options)


class Fused(TorchDispatchMode):
    """Counts the fused kernels that are called."""

    calls = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "_fused_" in str(operator)
        return operator(*args, **(kwargs or {}))


def fit(strategy: str, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], **settings: Any) -> Any:
    settings = {"max_epochs": EPOCHS, "shuffle": False, **settings}
    trainer = Trainer(strategy, micro_batch_size=N, accumulate_grad_batches=K, **settings)
    with Fused() as fused:
        trainer.fit(Optimized(optimizer, **options))
    model = trainer.strategy.state_dict()["model"]
    how = {(group["foreach"], group["fused"]) for group in trainer.optimizer.param_groups}
    how_counted = {state["step"].dtype for state in trainer.optimizer.state.values() if "step" in state}
    return torch.cat([tensor.flatten() for tensor in model.values()]), fused.calls, trainer.update, how, how_counted


def one_big_batch(P: int, task: Optimized) -> torch.Tensor:
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.configure_optimizer(model)
    for rows in in_order(SAMPLES, P * N * K) * EPOCHS:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)]).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize(
    ("P", "strategy", "optimizer", "options"),
    [
        (1, "single", torch.optim.AdamW, {}),
        (1, "single", torch.optim.SGD, {"momentum": 0.9}),
        (2, "ddp", torch.optim.Adam, {"amsgrad": True}),
        (2, "ddp", torch.optim.SGD, {"nesterov": True, "momentum": 0.9}),
        (2, "fsdp", torch.optim.AdamW, {}),
    ],
)
def test_a_fused_step_is_a_plain_one(
    P: int, strategy: str, optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    expected = one_big_batch(P, Optimized(optimizer, **options))
    found, calls, updates, how, _ = run(P, fit, strategy, optimizer, {**options, "fused": True})[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert calls >= updates > 0  # once per group, or more: DTensors ask again
    assert how == {(None, True)}


def go_on(first: bool, then: bool) -> Any:
    """Train two epochs in two runs, of which one may step otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        for epochs, fused in ((1, first), (2, then)):
            options = {"fused": True} if fused else {}
            last = fit("single", torch.optim.AdamW, options, max_epochs=epochs, run_dir=f"{folder}/run")
    return last


@pytest.fixture
def counts_in_float64() -> Iterator[None]:
    """In which a plain optimizer counts its steps; fused kernels read float32, on a GPU without asking."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("counts_in_float64")
@pytest.mark.parametrize("then", [False, True])
def test_a_run_that_goes_on_steps_as_it_is_told_now(then: bool) -> None:
    expected = fit("single", torch.optim.AdamW, {"fused": True}, max_epochs=2)[0]
    found, calls, updates, how, how_counted = go_on(first=not then, then=then)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert how == {(None, True if then else None)}
    assert calls == (3 * updates // 2 if then else 0)
    assert not then or how_counted == {torch.float32}


@pytest.mark.parametrize("name", ["compile_model", "prefetch_to_device"])
def test_what_is_no_bool_is_refused(name: str) -> None:
    options: Any = {name: "yes"}
    with pytest.raises(ValueError, match=f"{name}='yes': expected True or False"):
        Trainer("single", N, max_epochs=1, **options)
