"""A dataset that is in memory: Tally, which shuffles it, against the textbook's loop over torch's DataLoader.

    python tests/benchmarks/in_memory.py [--cpu] [--calls-only] [--only NAME ...]

The model, the micro-batches' size and the way to measure are those of overhead.py, within one epoch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.contenders import tally, textbook
from tests.benchmarks.counting import Event, compare
from tests.benchmarks.problem import MEASURED, WARM_UP, WINDOWS, N, at_updates, samples

NAMES = ["textbook, in order", "textbook, shuffled", "Tally, in order", "Tally, shuffled"]


def train(name: str, K: int) -> nn.Module:
    who, _, order = name.partition(", ")
    data, is_shuffled = TensorDataset(*samples()), order == "shuffled"
    if who == "Tally":
        return tally.everything_off(data, K, shuffle=is_shuffled)
    return textbook.train(DataLoader(data, N, shuffle=is_shuffled), K)


def run(name: str, K: int, start: Event, stop: Event) -> None:
    with at_updates({WARM_UP // K: start, (WARM_UP + MEASURED) // K: stop}):
        train(name, K)


def check(names: list[str]) -> list[str]:
    """Raise AssertionError where Tally, in order, is not the textbook's loop."""
    for K in WINDOWS:
        models = [train(f"{who}, in order", K) for who in ("textbook", "Tally")]
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            assert (a - b).abs().max() <= 1e-6, f"K={K}: a parameter differs from the textbook's"
    return names


if __name__ == "__main__":
    compare(__file__, __doc__, NAMES, run, check)
