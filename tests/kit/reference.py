"""Small models, data whose samples know their own index, and the reference: one big batch, in a few lines of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from engine import Callback, Task


def data(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x.sum(1, keepdim=True))


def mlp() -> nn.Module:
    """Large enough for gradients that move, small enough to run a thousand times."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


class Regression(Task):
    """Mean squared error in float64 with SGD; keeps the indices of the samples it was given, by micro-batch."""

    def __init__(self, samples: int, lr: float = 0.1, model: Callable[[], nn.Module] = mlp) -> None:
        self.x, self.y = data(samples)
        self.lr = lr
        self.model = model
        self.seen: list[list[int]] = []

    def configure_model(self) -> nn.Module:
        return self.model()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=self.lr)

    def train_data(self) -> Any:
        return TensorDataset(self.x, self.y, torch.arange(len(self.x)))

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, index = batch
        self.seen.append(index.tolist())
        return nn.functional.mse_loss(model(x), y)


class Samples(Dataset[Any]):
    """The same samples, one at a time, as most datasets are."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index], index


class Watch(Callback):
    """Keeps each update's record, and the task's samples by update."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.samples: list[list[int]] = []

    def on_update_end(self, trainer: Any) -> None:
        self.records.append(dict(trainer.record))
        seen = getattr(trainer.task, "seen", None)
        if seen is not None:
            self.samples.append([index for micro in seen for index in micro])
            seen.clear()


def parameters(model: nn.Module) -> Tensor:
    """All parameters in one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def big_batch_run(
    task: Regression, windows: Sequence[Sequence[Sequence[int]]], seed: int = 0, max_norm: float | None = None
) -> Tensor:
    """The reference: for each epoch, for each update, ONE batch of these samples, and plain SGD. No engine code."""
    torch.manual_seed(seed)
    model = task.model()
    for epoch in windows:
        for rows in epoch:
            loss = nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            if max_norm is not None:
                norm = torch.sqrt(sum((g**2).sum() for g in gradients))
                gradients = [g * min(1.0, max_norm / (norm.item() + 1e-6)) for g in gradients]
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= task.lr * g
    return parameters(model)


def in_order(samples: int, effective_batch: int) -> list[range]:
    """The windows of an epoch that is not shuffled."""
    return [range(start, min(start + effective_batch, samples)) for start in range(0, samples, effective_batch)]


class Branches(nn.Module):
    """Uses one of two layers, as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = (nn.Linear(5, 1).double() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) if x[0, 0] > 0 else self.right(x)
