"""PyTorch-Ignite: its supervised trainer."""

from ignite.engine import create_supervised_trainer
from torch import nn

from tests.benchmarks.problem import Data, configured, loss_fn


def train(data: Data, K: int) -> nn.Module:
    model, optimizer = configured()
    trainer = create_supervised_trainer(model, optimizer, loss_fn, gradient_accumulation_steps=K)
    trainer.run(data, max_epochs=1)
    return model
