"""Optimizers with modes (schedule-free): the engine switches them, and a validation leaves no trace in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import Accumulator, Loss, Trainer, parameter_groups
from strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from tests.kit.optimizers import KeepModel
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, data

BETA = 0.6


class ScheduleFree(torch.optim.Optimizer):
    """Steps z, trains y between z and their average x, and evaluates x: `p` is y or x, as its mode is."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "trains": False, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["trains"], "step in evaluation"
            group["updates"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / BETA)
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(x.lerp(z, 1 / group["updates"]).lerp(z, 1 - BETA))

    def train(self) -> None:
        self._move(True, 1 - BETA)

    def eval(self) -> None:
        self._move(False, 1 - 1 / BETA)

    @torch.no_grad()
    def _move(self, trains: bool, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["trains"] != trains else ():
                if "z" in self.state.get(p, {}):
                    p.lerp_(self.state[p]["z"], weight)
            group["trains"] = trains


def mlp() -> nn.Module:
    """In float32: a switch and back rounds."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


class Averaged(Regression):
    """Its validation is its training data: with the mean loss of the model in evaluation."""

    def __init__(self, validates: bool = True, is_alone: bool = True) -> None:
        super().__init__(24, model=mlp)
        self.x, self.y = (values.float() for values in data(24))
        self.validates, self.is_alone = validates, is_alone
        self.modes: list[tuple[str, bool]] = []

    def configure_optimizer(self, model: nn.Module) -> Any:
        if self.is_alone:
            self.optimizer = ScheduleFree(model.parameters(), lr=0.3)
            return self.optimizer
        first, rest = parameter_groups(model, first="0.*", rest="*")
        self.optimizer = ScheduleFree([first])
        return [self.optimizer, torch.optim.SGD([rest], lr=0.1)]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.modes.append(("loss", self.optimizer.param_groups[0]["trains"]))
        return super().loss(model, batch)

    def validation_data(self) -> Any:
        return TensorDataset(self.x, self.y) if self.validates else None

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        self.modes.append(("evaluate", self.optimizer.param_groups[0]["trains"]))
        return {"loss": Loss((model(batch[0]) - batch[1]).square().sum(), len(batch[0]))}


def fit(strategy: Strategy, task: Averaged, **settings: Any) -> Any:
    N = 4 // strategy.data_parallel_size
    trainer = Trainer(strategy, N, effective_batch_size=8, shuffle=False, callbacks=KeepModel(), **settings)
    trainer.fit(task)
    found = trainer.callbacks[0].model if strategy.rank == 0 else {}
    return found, trainer.metrics, set(task.modes)


def loss_of(model: dict[str, Tensor]) -> float:
    made, task = mlp(), Averaged()
    made.load_state_dict(model)
    with torch.no_grad():
        return nn.functional.mse_loss(made(task.x), task.y).item()


def by_hand(updates: int) -> dict[str, Tensor]:
    """The reference: x, of a loop that knows no modes."""
    torch.manual_seed(0)
    model, task = mlp(), Averaged()
    z = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = {name: p.detach().clone() for name, p in model.named_parameters()}
    for update in range(1, updates + 1):
        rows = slice(8 * ((update - 1) % 3), 8 * ((update - 1) % 3) + 8)
        gradients = torch.autograd.grad(
            nn.functional.mse_loss(model(task.x[rows]), task.y[rows]), list(model.parameters())
        )
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                z[name] -= 0.3 * gradient
                x[name] += (z[name] - x[name]) / update
                p.copy_((1 - BETA) * z[name] + BETA * x[name])
    return x


@pytest.mark.parametrize(
    ("P", "strategy", "is_alone"),
    [
        (1, SingleDeviceStrategy("cpu"), True),
        (1, SingleDeviceStrategy("cpu"), False),
        (2, DDPStrategy(), True),
        (2, FSDPStrategy(), True),
    ],
    ids=["single", "one of two", "ddp", "fsdp"],
)
def test_what_is_evaluated_is_what_is_saved(P: int, strategy: Strategy, is_alone: bool, tmp_path: Path) -> None:
    task, settings = Averaged(is_alone=is_alone), {"max_updates": 6, "validate_every_n_updates": 2}
    model, metrics, modes = run(P, fit_with, strategy, task, {**settings, "run_dir": str(tmp_path)}, group=P > 1)[0]
    assert modes == {("loss", True), ("evaluate", False)}
    if is_alone:
        for name, value in by_hand(6).items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-6)
    for file in (tmp_path / "model.safetensors", *tmp_path.glob("checkpoints/*/model.safetensors")):
        saved = load_file(file)
        assert all(torch.equal(saved[name], value) for name, value in model.items())
        assert loss_of(saved) == pytest.approx(metrics["loss"], abs=1e-6)


def fit_with(strategy: Strategy, task: Averaged, settings: dict[str, Any]) -> Any:
    return fit(strategy, task, **settings)


def test_a_validation_leaves_no_trace_in_training() -> None:
    with_it, _, _ = fit(SingleDeviceStrategy("cpu"), Averaged(), max_updates=6, validate_every_n_updates=1)
    without, _, _ = fit(SingleDeviceStrategy("cpu"), Averaged(validates=False), max_updates=6)
    assert all(torch.equal(without[name], value) for name, value in with_it.items())


@pytest.mark.parametrize(("P", "strategy"), [(1, SingleDeviceStrategy("cpu")), (2, FSDPStrategy())])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(P: int, strategy: Strategy, tmp_path: Path) -> None:
    def leg(name: str, updates: int, **more: Any) -> Any:
        settings = {"max_epochs": 9, "max_updates": updates, "run_dir": str(tmp_path / name), **more}
        return run(P, fit_with, strategy, Averaged(), settings, group=P > 1)[0]

    leg("in two", 2)
    (found, _, _), (expected, _, _) = leg("in two", 5), leg("in one", 5)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_trainer_validates_the_model_of_a_run_as_the_run_did(tmp_path: Path) -> None:
    settings: Any = {"max_updates": 6, "run_dir": str(tmp_path), "effective_batch_size": 8, "shuffle": False}
    trainer = Trainer("single", 4, **settings)
    trainer.fit(Averaged())
    expected = dict(trainer.metrics)
    assert trainer.validate(Averaged_again(trainer)) == expected
    later = Trainer("single", 4, **settings)
    assert later.validate(Averaged_again(trainer)) == expected


def Averaged_again(trainer: Trainer) -> Averaged:
    task = Averaged()
    task.optimizer = trainer.optimizer  # type: ignore[assignment]
    return task


def test_a_loop_of_ones_own_trains_in_each_epoch() -> None:
    task, strategy = Averaged(), SingleDeviceStrategy("cpu")
    strategy.setup()
    torch.manual_seed(0)
    model = strategy.prepare(mlp())
    optimizer = task.configure_optimizer(model)
    own = Accumulator(strategy, model, optimizer, task.train_data(), 4, 2, shuffle=False)
    for epoch in range(2):
        for window in own.windows(epoch):
            for batch in window:
                window.backward(task.loss(model, batch))
            window.update()
        optimizer.eval()
    for name, value in by_hand(6).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_divided_steps_refuse_modes() -> None:
    with pytest.raises(ChildError, match=r"ScheduleFree: its steps are divided among the processes, but train\(\)"):
        run(2, fit_with, DDPStrategy(shard_optimizer=True), Averaged(), {"max_updates": 1})
