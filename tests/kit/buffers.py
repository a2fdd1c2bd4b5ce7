"""Buffers of every kind, under every strategy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Buffers(nn.Module):
    """Buffers of every kind that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.float64))  # resized in place, as an observer's
        self.register_buffer("anew", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("hidden", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            length = 1 if len(self.sizes) == 3 else 3
            self.sizes.resize_(length).copy_(x.mean().expand(length))
            self.anew = self.anew + x.mean(0)
            self.hidden += x.mean()
            self.late = x.mean() if self.late is None else self.late + x.mean()
        return self.norm(x)


def every_kind() -> nn.Module:
    return nn.Sequential(Buffers(), nn.Linear(5, 1).double())


PLACES = [
    ("single", {}, 1),
    ("dp", {}, 1),
    ("ddp", {"device": "cpu"}, 2),
    ("fsdp", {"device": "cpu"}, 2),
    ("pipeline", {"stages": 2, "micro_batches": 2, "device": "cpu"}, 2),
]
