"""A tower of matrices and vectors for several optimizers, and a callback that keeps the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine import Callback


def tower() -> nn.Module:
    """Has a matrix of one row, of which most shards have nothing."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2


class KeepModel(Callback):
    """Keeps the model's whole state, also as one vector; process 0 has its values."""

    def on_fit_end(self, trainer: Any) -> None:
        self.model = trainer.strategy.state_dict()["model"]
        self.vector = torch.cat([value.flatten() for value in self.model.values()])
