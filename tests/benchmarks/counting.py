"""Counting what a run costs, in figures that do not depend on the machine's mood, and a table of them.

- calls: of Python and of C functions, as `sys.setprofile` sees them;
- instructions: as the processor counts them, or callgrind where it cannot be asked; the two differ by 0.5 % at most.
  Unlike seconds they hardly differ from run to run, or on a busy machine;
- CPU time of the thread: all take turns, and each ratio is of one round.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from tests.benchmarks.problem import MEASURED, WINDOWS
from tests.benchmarks.processor import InstructionCounter, ThreadClock

REPETITIONS = ROUNDS = 5
FIXED = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
"""The environment of those who are counted."""

Event = Callable[[], None]
Run = Callable[[str, int, Event, Event], object]
"""Lets the one of this name train with windows of K, and calls the two events around what is to be counted."""


def compare(
    script: str, description: str, names: Sequence[str], run: Run, check: Callable[[list[str]], list[str]]
) -> None:
    """Print what a micro-batch costs each of `names`, beside the first of them: the command line of `script`.

    `check` gets those that were chosen, and returns those that can be measured.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls-only", action="store_true", help="count calls, not instructions")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time only")
    parser.add_argument("--valgrind", action="store_true", help="count instructions with callgrind in any case: slowly")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--count", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.count:
        runs = [partial(run, options.count, K) for K in WINDOWS]
        if options.valgrind:
            _dump(runs)
        else:
            _print_counts(runs, ThreadClock if options.cpu else InstructionCounter)
        return
    names = check(list(dict.fromkeys([names[0], *options.only])))
    if options.calls_only:
        _print_table(names, "Calls", [[calls(run, name, K) for K in WINDOWS] for name in names])
        return
    if not options.cpu:
        count = _instructions_by_callgrind if options.valgrind or not _has_counter() else _counts
        if count is _counts or shutil.which("valgrind"):
            _print_table(names, "Instructions", [count(script, name) for name in names])
            print()
        else:
            print("This processor's counter cannot be read, and valgrind is not installed: CPU time only.\n")
    _print_table(names, "Nanoseconds of CPU time", _nanoseconds(script, names))


def calls(run: Run, name: str, K: int) -> float:
    """Count calls per micro-batch."""
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    run(name, K, lambda: sys.setprofile(see), lambda: sys.setprofile(None))
    return count / MEASURED


def _has_counter() -> bool:
    try:
        InstructionCounter()
    except OSError:
        return False
    return True


def _nanoseconds(script: str, names: Sequence[str]) -> list[list[float]]:
    """Measure CPU time per micro-batch, for each of `names` and WINDOWS: the median ratio times the first's median."""
    rounds = [[_counts(script, name, "--cpu") for name in names] for _ in range(ROUNDS)]
    found = []
    for number in range(len(names)):
        ratios = [statistics.median(r[number][i] / r[0][i] for r in rounds) for i in range(len(WINDOWS))]
        found.append([ratio * statistics.median(r[0][i] for r in rounds) for i, ratio in enumerate(ratios)])
    return found


def _counts(script: str, name: str, *options: str) -> list[float]:
    """Count instructions, or nanoseconds with the option --cpu, per micro-batch, for each of WINDOWS.

    Each name has a process of its own: some of those who are measured change torch for all others.
    """
    command = [sys.executable, script, "--count", name, *options]
    done = subprocess.run(command, env={**os.environ, **FIXED}, stdout=subprocess.PIPE, text=True, check=True)
    return [float(count) / MEASURED for count in done.stdout.splitlines()[-1].split()]


def _print_counts(
    runs: Sequence[Callable[[Event, Event], object]], meter: type[InstructionCounter | ThreadClock]
) -> None:
    """Print the median of each run's counts: what `_counts` starts."""
    medians = []
    for run in runs:
        counts = []
        for _ in range(REPETITIONS):
            counter = meter()
            run(_after_a_collection(counter.start), counter.stop)
            counts.append(counter.count)
        medians.append(sorted(counts)[REPETITIONS // 2])
    print(*medians)


def _instructions_by_callgrind(script: str, name: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        command = [*valgrind, sys.executable, script, "--valgrind", "--count", name]
        done = subprocess.run(command, env={**os.environ, **FIXED}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: valgrind ended with {done.returncode}:\n{done.stderr[-3000:]}")
        # out.1 is the first run, and so on; `out` is what came after the last
        dumps = [Path(folder, f"out.{number}").read_text() for number in range(1, len(WINDOWS) + 1)]
    return [sum(map(int, re.findall(r"^totals: (\d+)", dump, re.M))) / MEASURED for dump in dumps]


def _dump(runs: Sequence[Callable[[Event, Event], object]]) -> None:
    """Let callgrind write a file for each run: what `_instructions_by_callgrind` starts."""
    for run in runs:
        run(_after_a_collection(torch._C._valgrind_toggle), torch._C._valgrind_toggle_and_dump_stats)


def _after_a_collection(start: Event) -> Event:
    """Return `start` after a full collection: or one, over all that imports made, would be charged to whom it meets."""

    def begin() -> None:
        gc.collect()
        gc.freeze()
        start()

    return begin


def _print_table(names: Sequence[str], what: str, found: list[list[float]]) -> None:
    print(f"{what} per micro-batch, over {MEASURED} of them; in brackets: over that of *{names[0]}*.\n")
    print(f"| contender | {' | '.join(f'K={K}' for K in WINDOWS)} |\n| --- |{' --: |' * len(WINDOWS)}")
    for name, counts in zip(names, found, strict=True):
        cells = [f"{count:,.0f} ({count / first:.3f})" for count, first in zip(counts, found[0], strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
