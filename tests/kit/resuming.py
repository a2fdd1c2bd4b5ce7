"""A run that is stopped in the middle of its second epoch and resumed, beside the same run left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import Task, Trainer
from tests.kit.processes import run
from tests.kit.reference import Watch

SAMPLES, N, K, EPOCHS = 128, 8, 2, 3
Make = Callable[[int, int], Any]
"""From (rank, P) to data whose samples or micro-batches are {"id": ...}."""


class Ids(Task):
    """Notes which samples it is given."""

    def __init__(self, make: Make, rank: int, P: int) -> None:
        self.data, self.seen = make(rank, P), list[Any]()

    def configure_model(self) -> nn.Module:
        return nn.Linear(1, 1).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def train_data(self) -> Any:
        return self.data

    def loss(self, model: nn.Module, batch: Any) -> Any:
        ids = torch.as_tensor(batch["id"])
        self.seen.append(ids.tolist())
        return model(ids[:, None].double() / SAMPLES).square().mean()


def trained(make: Make, updates: int | None, folder: Path | None) -> list[list[int]]:
    """Return the samples of each update of this process."""
    watch = Watch()
    ends: Any = {"max_epochs": EPOCHS} if updates is None else {"max_updates": updates}
    trainer = Trainer("ddp", N, accumulate_grad_batches=K, callbacks=watch, run_dir=folder and str(folder), **ends)
    trainer.fit(Ids(make, trainer.strategy.data_parallel_rank, trainer.strategy.data_parallel_size))
    return watch.samples


def resumed(make: Make, P: int, folder: Path) -> tuple[list[Any], list[Any]]:
    """Return what each process sees after a stop at a third of the second epoch: of the run left alone, and resumed."""
    whole = run(P, trained, make, None, None)
    stop = len(whole[0]) // EPOCHS * 4 // 3
    run(P, trained, make, stop, folder)
    rest = run(P, trained, make, None, folder)
    return [samples[stop:] for samples in whole], rest
