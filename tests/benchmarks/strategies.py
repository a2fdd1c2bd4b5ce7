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


def kept() -> Rows:
    yield "strategy", "processes", "P", "effective batch", "variable windows", "off", "resumes as", "off"
    for case in CASES:
        P, batch, varies = exactness.declared(case)
        off, off_after = exactness.exactness(case), exactness.continued(case)
        name, processes = case.then or ("", 0)
        then = f"{name}, on {processes}"
        yield case.name, case.processes, P, batch, "yes" if varies else "no", f"{off:.0e}", then, f"{off_after:.0e}"


def costs() -> Iterator[tuple[Case, dict[int, footprint.Footprint]]]:
    """What each case takes at either K that it can have."""
    for case in (*CASES[:3], AT_ONCE, *CASES[3:]):
        yield case, {K: footprint.footprint(case, K, N) for K in (SMALL, LARGE) if case.smallest_window <= K}


def memory(found: list[tuple[Case, dict[int, footprint.Footprint]]]) -> Rows:
    yield "strategy", f"peak K={SMALL}", f"K={LARGE}", "optimizer's state"
    for case, at in found:
        yield (
            case.name,
            f"{at[SMALL].peak:.0f}" if SMALL in at else "",
            f"{at[LARGE].peak:.0f}",
            f"{at[LARGE].state:.0f}",
        )


def traffic(found: list[tuple[Case, dict[int, footprint.Footprint]]]) -> Rows:
    kinds = ("gradients", "parameters", "activations")
    yield (
        "strategy",
        *kinds,
        "the least",
        f"times, K={LARGE}",
        f"K={SMALL}",
        f"messages, bytes, K={LARGE}",
        f"K={SMALL}",
    )
    for case, at in found:
        if case.processes == 1:
            continue
        sums = {K: sum(each.given[kind] for kind in kinds) / footprint.least(case, K, N) for K, each in at.items()}
        given, least = at[LARGE].given, footprint.least(case, LARGE, N)
        yield (
            case.name,
            *(f"{given[kind] / MIB:.1f}" if given[kind] else "" for kind in kinds),
            f"{least / MIB:.1f}",
            *(f"{sums[K]:.2f}" if K in at else "" for K in (LARGE, SMALL)),
            *(f"{at[K].given['messages']}" if K in at else "" for K in (LARGE, SMALL)),
        )


def long_windows() -> Rows:
    yield "strategy", *(f"K={K}" for K in LONG), "each micro-batch more"
    for case in CASES:
        if case.name == "single" or (case.name.startswith("pipeline") and case.processes == 2):
            peaks = [footprint.footprint(case, K, LONG_N, LONG_WIDTH).peak for K in LONG]
            each = (peaks[-1] - peaks[-2]) / (LONG[-1] - LONG[-2])
            yield case.name, *(f"{peak:.1f}" for peak in peaks), f"{each:.2f}"


def hooks_of_ddp() -> Rows:
    yield "hook", "collectives", "bytes per update", "off", "accuracy"
    for name in hooks.HOOKS:
        found = hooks.hooked(name)
        yield name, found.collectives, f"{found.bytes:,}", f"{found.off:.1e}", f"{100 * found.accuracy:.1f} %"


def print_table(caption: str, rows: Rows, text_columns: int = 1) -> None:
    print(f"\n{caption}\n")
    for number, row in enumerate(rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if number == 0:
            print(f"| {' | '.join('---' if column < text_columns else '--:' for column in range(len(row)))} |")


def print_costs() -> None:
    size = f"{footprint.GRADIENTS / MIB:.0f} MiB of parameters in float32 with AdamW, N={N}"
    found = list(costs())
    print_table(f"MiB of peak memory: {size}.", memory(found))
    print_table(f"MiB that an update of K={LARGE} gives to collectives: {size}.", traffic(found))


PARTS: dict[str, Callable[[], None]] = {
    "kept": lambda: print_table(f"N={exactness.N}, K={exactness.K}.", kept()),
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
