"""User-defined datasets: CPU time per sample of Tally, over that of the textbook's loop on torch's `DataLoader`.

    python tests/benchmarks/datasets.py [--repetitions 9] [--samples 4096] [--only NAME ...] [--without-workers]

Both train the same small model on the same samples, in turn, in one process and one thread; CPU time does not count
other programs. Without workers it is the main thread's, between two updates; with workers, that of all processes of a
whole run, their start included.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine import Task, Trainer
from tests.benchmarks.problem import at_updates, configured

WARM_UP = 4
"""Updates before those that are measured."""


class Rows(Dataset[Any]):
    """Two rows in memory."""

    def __init__(self, samples: int) -> None:
        self.x, self.y = torch.randn(2, samples, 32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Tokens(Rows):
    """129 numbers of a file of uint16."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        with tempfile.NamedTemporaryFile(delete=False) as file:
            numpy.zeros(samples * 128 + 1, numpy.uint16).tofile(file)
        self.tokens = numpy.memmap(file.name, numpy.uint16, "r")
        os.unlink(file.name)

    def __getitem__(self, index: int) -> Any:
        tokens = torch.from_numpy(self.tokens[index * 128 : index * 128 + 129].astype(numpy.int64))
        return tokens[:-1], tokens[1:]


class Columns(Rows):
    """A dictionary of three tensors."""

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "y": self.y[index], "z": self.y[index]}


class Augmented(Rows):
    """Draws from all three generators in each sample."""

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.randn(32) * random.random() * numpy.random.random(), self.y[index]


class Batches(Rows):
    """Fetches whole pieces."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [(self.x[index], self.y[index]) for index in indices]


DATASETS = {"two rows": Rows, "memmap tokens": Tokens, "dict of 3": Columns, "draws": Augmented, "pieces": Batches}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"] + batch["z"]) if isinstance(batch, dict) else batch
    return nn.functional.mse_loss(model(x[:, :32].float()), y[:, :32].float())


class Linear(Task):
    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def configure_model(self) -> nn.Module:
        return configured()[0]

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-6)

    def train_data(self) -> Dataset[Any]:
        return self.data

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch)


def plain(data: Dataset[Any], N: int, workers: int) -> None:
    model = configured()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for batch in DataLoader(data, N, shuffle=True, num_workers=workers):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def tally(data: Dataset[Any], N: int, workers: int) -> None:
    Trainer("single", N, max_epochs=1, num_workers=workers, skip_nonfinite_updates=False).fit(Linear(data))


def cpu_seconds(train: Callable[..., None], data: Any, N: int, workers: int) -> float:
    """Return the CPU seconds per sample of an epoch of `train`."""
    if workers:
        before = os.times()[:4]
        train(data, N, workers)
        return (sum(os.times()[:4]) - sum(before)) / len(data)
    times: list[float] = []
    last = len(data) // N
    with at_updates(dict.fromkeys((WARM_UP, last), lambda: times.append(time.thread_time()))):
        train(data, N, 0)
    return (times[1] - times[0]) / (last - WARM_UP) / N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--without-workers", action="store_true", help="leave out the row with two workers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = ((1, 0), (16, 0), (64, 0), (16, 2))[: 3 if options.without_workers else 4]
    print(f"us a sample of the plain loop, of Tally (ratio): K=1, medians of {options.repetitions} runs in turn.\n")
    columns = " | ".join(f"N={N}" + (f", {workers} workers" if workers else "") for N, workers in sizes)
    print(f"| dataset | {columns} |\n| --- |{' --: |' * len(sizes)}")
    for name in options.only:
        cells = []
        for N, workers in sizes:
            data = DATASETS[name](options.samples * (8 if workers else 1) // (4 if N == 1 else 1))
            runs = ([cpu_seconds(f, data, N, workers) for f in (plain, tally)] for _ in range(options.repetitions))
            theirs, ours = (1e6 * statistics.median(times) for times in zip(*runs, strict=True))
            cells.append(f"{theirs:.1f}, {ours:.1f} ({ours / theirs:.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
