"""Tally, as little as there can be of it, and as its command line runs it."""

import contextlib
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from engine import Task, Trainer
from tests.benchmarks.problem import Data, N, loss_fn, make_model, make_optimizer


class Linear(Task):
    def __init__(self, data: Data) -> None:
        self._data = data

    def configure_model(self) -> nn.Module:
        return make_model()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model)

    def train_data(self) -> Data:
        return self._data

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return loss_fn(model(x), y)


def everything_off(data: Data, K: int, **options: Any) -> nn.Module:
    """What the textbook's loop does, no more."""
    return train(data, K, skip_nonfinite_updates=False, **options)


def as_shipped(data: Data, K: int) -> nn.Module:
    """A run's folder with each update's loss and gradient norm, progress, and a look at each gradient norm."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
    ):
        return train(data, K, run_dir=f"{folder}/run", progress=True)


def train(data: Data, K: int, **options: Any) -> nn.Module:
    trainer = Trainer("single", N, accumulate_grad_batches=K, max_epochs=1, **options)
    trainer.fit(Linear(data))
    return trainer.model
