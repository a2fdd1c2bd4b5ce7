"""Padded sequences, and one big batch of them in a few lines of torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine import Loss, Task
from tests.kit.reference import parameters

VOCABULARY = 11


class Sequences(Task):
    """Next-token prediction on padded sequences of very different lengths; some have no token at all to predict."""

    def __init__(self, samples: int, masked: range = range(0), as_tensor: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, VOCABULARY, (samples, 20), generator=generator)
        lengths = torch.randint(2, 20, (samples,), generator=generator)
        self.valid = torch.arange(1, 20) < lengths[:, None]
        self.valid[list(masked)] = False
        self.as_tensor = as_tensor

    def configure_model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(self.tokens, self.valid)

    def token_losses(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        tokens, valid = batch
        weight = valid.sum()
        return Loss((self.token_losses(model, tokens) * valid).sum(), weight if self.as_tensor else int(weight))


def big_batch(task: Sequences, windows: Any, epochs: int, max_norm: float | None) -> tuple[Tensor, list[float]]:
    torch.manual_seed(0)
    model, losses = task.configure_model(), []
    for rows in windows * epochs:
        tokens, valid = task.tokens[list(rows)], task.valid[list(rows)]
        if not valid.any():
            losses.append(math.nan)
            continue
        loss = task.token_losses(model, tokens)[valid].mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm.item() + 1e-6))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.5 * factor * g
        losses.append(loss.item())
    return parameters(model), losses
