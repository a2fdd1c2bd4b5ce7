"""What each strategy keeps, and what it costs: exactness, going on elsewhere, memory, and bytes against the least.

    python tests/benchmarks/strategies.py [--only WORD ...]

Processes are forked and meet on the CPU. No figure is one of time, so that a busy machine changes none of them.

- kept: a small model in float64. "off" is the largest relative difference from plain torch with one big batch for each
  window: over short windows, ragged micro-batches, and windows with one sample for all processes together; then of a
  run that stopped in the middle of an epoch and went on with another strategy, or P, at the same effective batch;
- memory: the peak of the process that needs most, above that of the same run of a tiny model;
- bytes: the tensors that collectives reduce or send, and those that they fill with parameters, in an update and on the
  process that has most of them;
- windows of pipelines: their peak memory at several K, beside that of a strategy that keeps nothing of a window;
- hooks: those of DDP, on the digits recipe.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed.pipelining  # here once, not in each process

from tests.benchmarks import exactness, footprint, hooks
from tests.benchmarks.cases import AT_ONCE, CASES, Case
from tests.benchmarks.memory import ENVIRONMENT

SMALL, LARGE = 1, 8
"""The windows of which memory and bytes are told."""
N = 16
LONG = (2, 8, 32)
LONG_N, LONG_WIDTH = 1024, 64
MIB = footprint.MIB

Rows = Iterator[tuple[object, ...]]


def print_kept() -> None:
    off = max(exactness.exactness(case) for case in CASES)
    off_after = max(exactness.continued(case) for case in CASES)
    print(f"\nEach strategy of the next table, at N={exactness.N}, K={exactness.K}: off by at most {off:.0e}.")
    print(f"Stopped, and resumed as another or on other processes: by at most {off_after:.0e}.")


def costs() -> Iterator[tuple[Case, dict[int, footprint.Footprint]]]:
    """What each case takes at either K that it can have."""
    for case in (*CASES[:3], AT_ONCE, *CASES[3:]):
        yield case, {K: footprint.footprint(case, K, N) for K in (SMALL, LARGE) if case.smallest_window <= K}


def table_of(found: list[tuple[Case, dict[int, footprint.Footprint]]]) -> Rows:
    """Peaks and bytes in MiB; the least of collectives, and messages in bytes."""
    kinds = ("gradients", "parameters", "activations")
    yield "strategy", f"peak K={SMALL}", f"K={LARGE}", "optimizer's state", *kinds, "the least", "messages, bytes"
    for case, at in found:
        largest = at[LARGE]
        sent = ["", "", "", "", ""]
        if case.processes > 1:
            least = footprint.least(case, LARGE, N) / MIB
            sent = [f"{largest.given[kind] / MIB:.1f}" if largest.given[kind] else "" for kind in kinds]
            sent += [f"{least:.1f}", f"{largest.given['messages']}"]
        peak = f"{at[SMALL].peak:.0f}" if SMALL in at else ""
        yield case.name, peak, f"{largest.peak:.0f}", f"{largest.state:.0f}", *sent


def long_windows() -> Rows:
    yield "strategy", *(f"K={K}" for K in LONG), "each micro-batch more"
    for case in CASES:
        if case.name == "single" or (case.name.startswith("pipeline") and case.processes == 2):
            peaks = [footprint.footprint(case, K, LONG_N, LONG_WIDTH).peak for K in LONG]
            each = (peaks[-1] - peaks[-2]) / (LONG[-1] - LONG[-2])
            yield case.name, *(f"{peak:.1f}" for peak in peaks), f"{each:.2f}"


def hooks_of_ddp() -> Rows:
    yield "hook", "bytes per update", "off", "accuracy"
    for name in hooks.HOOKS:
        found = hooks.hooked(name)
        yield name, f"{found.bytes:,}", f"{found.off:.1e}", f"{100 * found.accuracy:.1f} %"


def print_table(caption: str, rows: Rows, text_columns: int = 1) -> None:
    print(f"\n{caption}\n")
    for number, row in enumerate(rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if number == 0:
            print(f"| {' | '.join('---' if column < text_columns else '--:' for column in range(len(row)))} |")


def print_costs() -> None:
    size = f"{footprint.GRADIENTS / MIB:.0f} MiB of parameters in float32 with AdamW, N={N}"
    caption = f"MiB: {size}. Peak memory, and what an update of K={LARGE} gives to collectives."
    print_table(caption, table_of(list(costs())))


PARTS: dict[str, Callable[[], None]] = {
    "kept": print_kept,
    "costs": print_costs,
    "windows": lambda: print_table(
        f"MiB of peak memory where {4 * LONG_N * LONG_WIDTH / MIB:g} MiB pass between two layers.", long_windows()
    ),
    "hooks": lambda: print_table(
        f"The digits model and data, N=16, K=2, {hooks.EPOCHS} epochs on two processes. *off*: how far the first "
        "gradient that a hook sends is from the same without one, relative.",
        hooks_of_ddp(),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="WORD", help=", ".join(PARTS))
    chosen = parser.parse_args().only
    if not ENVIRONMENT.items() <= os.environ.items():  # the allocator reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    torch.set_num_threads(1)
    for name in chosen:
        PARTS[name]()


if __name__ == "__main__":
    main()
