"""What DDP's communication hooks cost and give: they train the digits recipe on two processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from engine import Callback, Trainer
from launch.recipes.digits.task import Digits
from strategies import DDPStrategy
from tests.kit.processes import run

HOOKS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"communication_hook": "fp16"},
    "bf16": {"communication_hook": "bf16"},
}
EPOCHS = 20


class Hooked(NamedTuple):
    collectives: int
    bytes: int
    """Per update."""
    off: float
    """The relative error of the first gradient that a hook sends, against the same gradient without one."""
    accuracy: float


class AsSent(DDPStrategy):
    """Keeps the first gradient."""

    kept: torch.Tensor | None = None

    def clip(self, max_norm: float | None, factor: float = 1.0) -> torch.Tensor:
        norm = super().clip(max_norm, factor)
        if self.kept is None:
            self.kept = torch.cat([p.grad.double().flatten() for p in self._parameters if p.grad is not None])
        return norm


class Told(Callback):
    """Keeps what the last window has sent."""

    def on_fit_end(self, trainer: Trainer) -> None:
        self.reductions = trainer.strategy.reductions()


def first_gradient(options: dict[str, Any]) -> torch.Tensor:
    strategy = AsSent(device="cpu", **options)
    Trainer(strategy, 16, 2, max_updates=1).fit(Digits())
    assert strategy.kept is not None
    return strategy.kept


def train(options: dict[str, Any]) -> Hooked:
    exact, sent = first_gradient({}), first_gradient(options)
    told = Told()
    trainer = Trainer(DDPStrategy(device="cpu", **options), 16, 2, max_epochs=EPOCHS, callbacks=told)
    trainer.fit(Digits())
    off = torch.linalg.vector_norm(sent - exact) / torch.linalg.vector_norm(exact)
    return Hooked(*told.reductions, float(off), trainer.metrics["accuracy"])


def hooked(name: str) -> Hooked:
    """Train with the hook of that name."""
    return Hooked(*run(2, train, HOOKS[name], seconds=500)[0])
