"""Two views of each digit: a contrastive loss over all images of an update, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from engine import WindowTask
from engine.losses import contrastive
from engine.window_task import Output, Rows
from launch.recipes.digits.task import digits


class DigitViews(WindowTask):
    """Learn an encoder that tells two views of one image from all others of the update (SimCLR, Chen et al., 2020).

    A view is the image, moved by up to a pixel, with noise; it is drawn in forward, so the second pass draws the same.
    """

    def __init__(self, lr: float = 3e-3, temperature: float = 0.1, noise: float = 0.1, features: int = 32) -> None:
        self.lr = lr
        self.temperature = temperature
        self.noise = noise
        self.features = features

    def configure_model(self) -> nn.Module:
        """Return the encoder: 8 x 8 -> `features`."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, self.features))

    def configure_optimizer(self, model: nn.Module) -> Optimizer:
        """Return AdamW."""
        return AdamW(model.parameters(), lr=self.lr)

    def train_data(self) -> TensorDataset:
        """Return four fifths of the images, with digits that training does not look at."""
        return digits(held_out=False)

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        """Return the features of two views of each image, of length 1."""
        first, second = (normalize(model(self.view(batch[0])), dim=1) for _ in range(2))
        return {"first": Rows(first), "second": Rows(second)}

    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the contrastive loss over all images of the update."""
        return contrastive(outputs["first"], outputs["second"], 1 / self.temperature)

    def view(self, images: Tensor) -> Tensor:
        """Return the images, each moved by -1 to 1 pixel in both directions, with noise."""
        padded = nn.functional.pad(images, (1, 1, 1, 1))
        moves = torch.randint(0, 3, (len(images), 2)).tolist()
        moved = [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves, strict=True)]
        return torch.stack(moved) + self.noise * torch.randn_like(images)


def retrieval(model: nn.Module, task: DigitViews) -> float:
    """Return the share of held-out images of which one view is nearest to the other, among the views of all of them."""
    images, _ = digits(held_out=True).tensors
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (normalize(model(task.view(images)), dim=1) for _ in range(2))
    return ((first @ second.T).argmax(1) == torch.arange(len(images))).double().mean().item()
