"""What `fused_optimizer=True` changes: milliseconds of a step beside the plain one's, and where parameters end.

    python tests/benchmarks/fused.py

A model of 2.1 million parameters on one CPU thread. Times are medians of steps that take turns, on gradients of the
same size; the difference is that of two runs of 50 updates, relative to the largest parameter.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from engine.fusing import fuse
from torch import nn

from engine import Task, Trainer

WIDTH, UPDATES, ROUNDS, STEPS = 1024, 50, 15, 5
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


class Autoencoder(Task):
    def __init__(self, name: str, dtype: torch.dtype, width: int) -> None:
        self.name, self.dtype, self.width = name, dtype, width

    def configure_model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(self.dtype)

    def configure_optimizer(self, model: nn.Module) -> Any:
        return OPTIMIZERS[self.name](model.parameters())

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = torch.rand(4 * UPDATES, self.width, generator=generator, dtype=self.dtype)
        return torch.utils.data.TensorDataset(data)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(model(batch[0]), batch[0])


def milliseconds(name: str) -> tuple[float, float]:
    """Return those of a plain step and of a fused one."""
    optimizers = []
    for is_fused in (False, True):
        task = Autoencoder(name, torch.float32, WIDTH)
        torch.manual_seed(0)
        model = task.configure_model()
        optimizers.append(task.configure_optimizer(model))
        if is_fused:
            fuse(optimizers[-1])
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for optimizer, spent in zip(optimizers, times, strict=True):
            started = time.perf_counter()
            for _ in range(STEPS):
                optimizer.step()
            spent.append(1000 * (time.perf_counter() - started) / STEPS)
    return median(times[0]), median(times[1])


def difference(name: str, dtype: torch.dtype) -> float:
    """Return the largest one of all parameters after a plain and a fused run, over the largest parameter."""
    ends = []
    for is_fused in (False, True):
        trainer = Trainer("single", 2, 2, max_updates=UPDATES, fused_optimizer=is_fused)
        trainer.fit(Autoencoder(name, dtype, 64))
        ends.append(torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()]))
    return float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())


def main() -> None:
    torch.set_num_threads(1)
    print("| optimizer | plain, ms | fused, ms | ratio | difference in float64 | in float32 |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name in OPTIMIZERS:
        plain, fused = milliseconds(name)
        apart = " | ".join(f"{difference(name, dtype):.1e}" for dtype in (torch.float64, torch.float32))
        print(f"| {name} | {plain:.2f} | {fused:.2f} | {fused / plain:.2f} | {apart} |")


if __name__ == "__main__":
    main()
