"""Counting what a run costs, in figures that do not depend on the machine's mood, and a table of them.

- calls: of Python and of C functions, as `sys.setprofile` sees them;
- instructions: as callgrind counts them. Unlike seconds they hardly differ from run to run, or on a busy machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from benchmarks.problem import MEASURED, WINDOWS

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
    parser.add_argument("--calls-only", action="store_true", help="do not run valgrind")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--under-valgrind", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.under_valgrind:
        _run_under_valgrind([partial(run, options.under_valgrind, K) for K in WINDOWS])
        return
    names = check(list(dict.fromkeys([names[0], *options.only])))
    called = [[calls(run, name, K) for K in WINDOWS] for name in names]
    counted = None
    if not options.calls_only and shutil.which("valgrind") is None:
        print("valgrind is not installed: calls only.\n")
    elif not options.calls_only:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counted = list(pool.map(partial(_instructions, script), names))
    _print_table(names, called, counted)


def calls(run: Run, name: str, K: int) -> float:
    """Count calls per micro-batch."""
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    run(name, K, lambda: sys.setprofile(see), lambda: sys.setprofile(None))
    return count / MEASURED


def _instructions(script: str, name: str) -> list[float]:
    """Count instructions per micro-batch, for each of WINDOWS.

    Each name has a process of its own: some of those who are measured change torch for all others.
    """
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        command = [*valgrind, sys.executable, script, "--under-valgrind", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: valgrind ended with {done.returncode}:\n{done.stderr[-3000:]}")
        # out.1 is the first run, and so on; `out` is what came after the last
        dumps = [Path(folder, f"out.{number}").read_text() for number in range(1, len(WINDOWS) + 1)]
    return [sum(map(int, re.findall(r"^totals: (\d+)", dump, re.M))) / MEASURED for dump in dumps]


def _run_under_valgrind(runs: Sequence[Callable[[Event, Event], object]]) -> None:
    """Make the runs, each leaving a dump of what was counted in it."""

    def start() -> None:
        gc.collect()
        gc.freeze()  # or a full collection, over all that imports made, would be charged to whom it happens to meet
        torch._C._valgrind_toggle()

    for run in runs:
        run(start, torch._C._valgrind_toggle_and_dump_stats)


def _print_table(names: Sequence[str], called: list[list[float]], counted: list[list[float]] | None) -> None:
    print(f"Per micro-batch, over {MEASURED} of them; in brackets: over that of *{names[0]}*.\n")
    print("| contender | K | calls | instructions |\n| --- | --: | --: | --: |")
    for k, K in enumerate(WINDOWS):
        for i, name in enumerate(names):
            in_calls = f"{called[i][k]:.1f} ({called[i][k] / called[0][k]:.2f})"
            in_instructions = "not counted"
            if counted:
                in_instructions = f"{counted[i][k]:,.0f} ({counted[i][k] / counted[0][k]:.3f})"
            print(f"| {name} | {K} | {in_calls} | {in_instructions} |")
