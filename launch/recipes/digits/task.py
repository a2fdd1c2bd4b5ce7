"""A small CNN on the 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import TensorDataset

from engine import Loss, Task
from engine.errors import UserError


class Digits(Task):
    """Classify 8 x 8 images of digits; every fifth image is held out.

    The learning rate warms up linearly over the first `warmup` share of the updates and then falls to zero on half
    a cosine.
    """

    def __init__(self, lr: float = 3e-3, weight_decay: float = 0.05, warmup: float = 0.1, dropout: float = 0.2) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.dropout = dropout

    def configure_model(self) -> nn.Module:
        """Return the CNN: 8 x 8 -> 4 x 4 -> 10."""
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(64 * 4 * 4, 10),
        )

    def configure_optimizer(self, model: nn.Module) -> tuple[Optimizer, LRScheduler]:
        """Return AdamW with a warm-up and a cosine over exactly the updates to come."""
        optimizer = AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = self.total_updates or 1
        warmup = max(1, round(self.warmup * total))

        def factor(update: int) -> float:
            if update < warmup:
                return (update + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup)))

        return optimizer, LambdaLR(optimizer, factor)

    def train_data(self) -> TensorDataset:
        """Return four fifths of the images, 1 x 8 x 8, from 0 to 1, with their digits."""
        return digits(held_out=False)

    def validation_data(self) -> TensorDataset:
        """Return every fifth image."""
        return digits(held_out=True)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy over the images."""
        images, digits = batch
        return cross_entropy(model(images), digits)

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss | Tensor]:
        """Return cross-entropy and accuracy."""
        images, digits = batch
        scores = model(images)
        return {
            "loss": cross_entropy(scores, digits),
            "accuracy": Loss((scores.argmax(1) == digits).sum(), len(digits)),
        }


def digits(held_out: bool) -> TensorDataset:
    """Return the images of scikit-learn, and their digits: every fifth, or the others."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError("the digits recipe needs scikit-learn: pip install 'tally-engine[recipes]'.") from error

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    chosen = (torch.arange(len(labels)) % 5 == 0) == held_out
    return TensorDataset(images[chosen], labels[chosen])
