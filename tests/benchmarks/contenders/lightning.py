"""Lightning: a LightningModule and its Trainer, in its own mode for measuring overhead, and as it comes."""

import contextlib
import logging
import os
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn

from tests.benchmarks.problem import Data, loss_fn, make_model, make_optimizer


class Linear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return loss_fn(self.model(x), y)


class LoggedLinear(Linear):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def everything_off(data: Data, K: int) -> nn.Module:
    return train(Linear(), data, K, barebones=True)


def as_shipped(data: Data, K: int) -> nn.Module:
    """With its defaults: progress, a checkpoint and a logger, which is given nothing."""
    return with_defaults(Linear(), data, K)


def logging_the_loss(data: Data, K: int) -> nn.Module:
    """The same, where the model logs its loss, of which the logger writes each 50th update's."""
    return with_defaults(LoggedLinear(), data, K)


def with_defaults(module: Linear, data: Data, K: int) -> nn.Module:
    """The bar is that of a plain installation.

    Where `rich` is installed the default one is drawn by a thread, by time, of which a count could tell nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        return train(module, data, K, default_root_dir=folder, callbacks=TQDMProgressBar())


def train(module: Linear, data: Data, K: int, **options: Any) -> nn.Module:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        warnings.simplefilter("ignore")
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=K, **options)
        trainer.fit(module, data)
    return module.model
