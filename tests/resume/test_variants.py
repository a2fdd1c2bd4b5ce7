"""Interrupted and continued is uninterrupted, to the bit, for any optimizer, schedule, data and random draws."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from engine import Callback, Trainer
from strategies import DDPStrategy
from tests.kit.killed import history, same
from tests.kit.processes import run
from tests.kit.reference import Regression, Samples, mlp

SAMPLES, UPDATES = 22, 12  # two epochs of six updates, the last of each short


class Variant(Regression):
    """The regression, with the parts that a case replaces."""

    def __init__(self, **parts: Callable[..., Any]) -> None:
        super().__init__(SAMPLES, lr=0.05)
        self.parts = parts

    def configure_model(self) -> nn.Module:
        return self.parts.get("model", mlp)()

    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = self.parts.get("optimizer", torch.optim.AdamW)(model.parameters(), lr=self.lr)
        scheduler = self.parts.get("scheduler")
        return (optimizer, scheduler(optimizer)) if scheduler else optimizer

    def train_data(self) -> Any:
        return self.parts.get("data", Samples)(self.x, self.y)

    def validation_data(self) -> Any:
        return Samples(self.x[:5], self.y[:5])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        if "evaluate" in self.parts:
            self.parts["evaluate"]()
        return super().evaluate(model, batch)

    def collate(self, samples: list[Any]) -> Any:
        x, y, index = super().collate(samples)
        return self.parts.get("mix", lambda x: x)(x), y, index

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x = self.parts.get("draw", lambda x: x)(batch[0])
        return nn.functional.mse_loss(model(x), batch[1])


class Half(nn.Module):
    """Has parameters that it never uses, and some that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.used, self.frozen = (nn.Linear(5, 5).double() for _ in range(3))
        self.out = nn.Linear(5, 1).double()
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.frozen(self.used(x))))


def sometimes(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn_like(x) if x[0, 0] > 0 else x


def sometimes_from_all(x: torch.Tensor) -> torch.Tensor:
    """Draw one number of a pair, too, which the generators' states do not show."""
    return sometimes(x) * random.gauss(1, 0.1) * numpy.random.standard_normal() if x[0, 0] > 1 else x


def sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.MultiStepLR(optimizer, [2, 5, 5], 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def loader(x: Any, y: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(Samples(x, y), batch_size=2, shuffle=True, generator=generator)


CASES: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": torch.optim.SGD},
    "momentum": {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True)},
    "NAdam": {"optimizer": torch.optim.NAdam},
    "Adagrad": {"optimizer": torch.optim.Adagrad},
    "Adafactor": {"optimizer": torch.optim.Adafactor},
    "unused and frozen parameters": {"model": Half},
    "OneCycleLR": {"scheduler": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=UPDATES + 1)},
    "LambdaLR": {"scheduler": lambda o: lr_scheduler.LambdaLR(o, lambda update: 1 / (1 + update))},
    "SequentialLR and MultiStepLR": {"scheduler": sequence},
    "CosineAnnealingWarmRestarts": {"scheduler": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)},
    "a forward that draws from torch": {"draw": lambda x: x + torch.randn_like(x)},
    "from torch, in some batches": {"draw": sometimes},
    "from numpy": {"draw": lambda x: x * numpy.random.beta(0.3, 0.3)},
    "from random": {"draw": lambda x: x * random.random()},
    "from all three, in some batches": {"draw": sometimes_from_all},
    "a collate that draws": {"mix": lambda x: x * random.random() + torch.rand(()) + numpy.random.rand()},
    "a validation that draws": {"evaluate": lambda: [torch.rand(()), random.random(), numpy.random.rand()]},
    "a loader that shuffles by itself": {"data": lambda x, y: DataLoader(Samples(x, y), batch_size=2, shuffle=True)},
    "a loader with a generator": {"data": loader},
}


class Stops(Callback):
    """Interrupts the run after an update, and has a tensor that every update changes."""

    def __init__(self, at: int) -> None:
        self.at, self.sum = at, torch.zeros(3)

    def on_update_end(self, trainer: Any) -> None:
        self.sum += trainer.update
        if trainer.update == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "views": [self.sum[:2], self.sum[1:]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"].clone()


def fit(folder: Path, case: str, at: int = 0, strategy: Any = "single") -> Any:
    stops = Stops(at)
    trainer = Trainer(
        strategy,
        micro_batch_size=2,
        accumulate_grad_batches=2,
        max_epochs=2,
        callbacks=stops,
        run_dir=str(folder),
        save_every_n_updates=1,
        validate_every_n_updates=4,
    )
    trainer.fit(Variant(**CASES[case]))
    assert bool(trainer.interrupted_by) == (at > 0)
    return trainer.model.state_dict(), stops.sum


@pytest.mark.parametrize("case", CASES)
def test_interrupted_is_uninterrupted(case: str, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", case)
    for at in (1, 4, 6, 8, 11):
        fit(tmp_path / str(at), case, at)
        assert same(fit(tmp_path / str(at), case), whole)
        assert history(tmp_path / str(at)) == history(tmp_path / "whole")


def fit_unused(folder: Path, at: int) -> Any:
    if torch.distributed.get_rank() == 1:
        at = -at  # one process is told, and both stop
    stops, strategy = Stops(at), DDPStrategy(find_unused_parameters=True)
    trainer = Trainer(strategy, micro_batch_size=2, max_epochs=2, callbacks=stops, run_dir=str(folder))
    trainer.fit(Variant(model=Half))
    return trainer.model.state_dict()


def test_a_process_without_data_in_the_first_window_after_an_interruption(tmp_path: Path) -> None:
    whole = run(2, fit_unused, tmp_path / "whole", 0)
    run(2, fit_unused, tmp_path / "parts", 5)  # the sixth window has one micro-batch
    assert same(run(2, fit_unused, tmp_path / "parts", 0), whole)


def test_workers_of_a_loader_outlive_a_signal_to_all(tmp_path: Path) -> None:
    def everyone(trainer: Any) -> None:
        if trainer.update == 3:
            os.killpg(os.getpid(), signal.SIGTERM)

    def child() -> Any:
        os.setpgid(0, 0)
        told = Callback()
        told.on_update_end = everyone  # type: ignore[method-assign]
        trainer = Trainer(
            "single", micro_batch_size=2, max_epochs=2, num_workers=1, run_dir=str(tmp_path / "run"), callbacks=told
        )
        trainer.fit(Variant())
        return trainer.interrupted_by, trainer.update

    assert run(1, child, group=False) == [("SIGTERM", 3)]
