"""What one micro-batch costs beside the user's forward and backward: engines against the loop that everybody writes.

    python tests/benchmarks/overhead.py [--cpu] [--calls-only] [--only NAME ...]

Each contender trains on the same ready micro-batches in one process and one thread, and is measured over the same ones
of them, at window boundaries after a warm-up, so that no start-up is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.contenders import WHERE, contender
from tests.benchmarks.counting import Event, compare
from tests.benchmarks.problem import WINDOWS, Feed


def run(name: str, K: int, start: Event, stop: Event) -> None:
    contender(name)(Feed(start, stop), K)


def those_that_agree(names: list[str]) -> list[str]:
    """Return the contenders that are installed, and print the others.

    Raises AssertionError where one ends with other parameters than the textbook: it would be another run.
    """
    found = []
    for name in names:
        try:
            train = contender(name)
        except ImportError as error:
            print(f"Left out: {name} ({error}). The extra `peers` has them all.\n")
            continue
        found.append(name)
        for K in WINDOWS:
            expected, actual = contender("textbook")(Feed(), K), train(Feed(), K)
            for a, b in zip(expected.parameters(), actual.parameters(), strict=True):
                difference = (a - b).abs().max().item()
                assert difference <= 1e-6, f"{name}, K={K}: a parameter differs from the textbook's by {difference}"
    return found


if __name__ == "__main__":
    compare(__file__, __doc__, list(WHERE), run, those_that_agree)
