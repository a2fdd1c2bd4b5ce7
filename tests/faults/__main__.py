"""Break the engine on purpose, one fault at a time, and see a test go red for each.

    python -m tests.faults                      # all of them, two at a time, in copies: the code stays as it is
    python -m tests.faults clip stream          # those whose name has one of these words
    python -m tests.faults --room update ddp    # those of these rooms
    python -m tests.faults --list               # their names, by room
    python -m tests.faults --check              # apply each in memory and run no test: a second

Prints a table. Fails if a fault survives, or no longer applies because its function has changed.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis
import jsonargparse
import numpy
import orjson
import pytest
import pytest_timeout
import rich.progress
import sklearn.datasets
import torch.distributed.fsdp
import torch.distributed.pipelining
import yaml

import tests.kit.processes
from tests.faults.fault import PACKAGES, Fault, StaleFaultError, broken
from tests.faults.rooms import ROOMS
from tests.kit import ROOT

COPIED = (*PACKAGES, "launch", "tests", "pyproject.toml")
IMPORTED_ONCE = (
    *(
        hypothesis,
        jsonargparse,
        numpy,
        orjson,
        pytest_timeout,
        rich.progress,
        sklearn.datasets,
        yaml,
        tests.kit.processes,
    ),
    *(torch.distributed.fsdp, torch.distributed.pipelining),
)
"""What tests import beside this repository: here, not in each pytest, of which all are forks of this process."""
OPTIONS = [
    "-x",
    "-q",
    "--tb=no",
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_timeout",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]
WORKERS = int(os.environ.get("TEST_WORKERS", "2"))
FORK = multiprocessing.get_context("fork")


def copy_into(folder: str) -> Path:
    """Return a copy of the code in `folder`."""
    copy = Path(folder) / "tally"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def test(copy: Path, selection: str) -> tuple[int, str]:
    """Run tests in a copy; return pytest's exit status and the first that failed, or else what was printed last."""
    output = copy.parent / "output"
    process = FORK.Process(target=_test, args=(copy, selection, output))
    process.start()
    process.join()
    said = output.read_text()
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return process.exitcode or 0, failed[1] if failed else said[-500:]


def _test(copy: Path, selection: str, output: Path) -> None:
    """Become a pytest in `copy`, as far as a test can see."""
    gc.freeze()  # what was there before the fork is not this process's to collect
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take a second to import
    os.environ["TALLY_FAULT"] = "1"
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # they are this checkout's
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    status = pytest.main([*OPTIONS, *shlex.split(selection)])
    sys.stdout.flush()
    os._exit(status)


def children_seconds() -> float:
    """Return the seconds of the processor that the ended children of this process have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def apply(fault: Fault) -> str:
    """Break a copy; return the test that went red and its cost, or what is wrong in capitals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(folder)
        try:
            file, changed = broken(fault, copy)
        except StaleFaultError as error:
            return f"NOT APPLIED: {error}"
        file.write_text(changed)
        before = children_seconds()
        status, red = test(copy, fault.tests)
        if os.environ.get("TALLY_COSTS"):
            print(f"{children_seconds() - before:5.1f} s {fault.name}: {red}", file=sys.stderr, flush=True)
    return (
        f"`{red.removeprefix('tests/').partition('[')[0]}`" if status == 1 else f"SURVIVED (pytest ended with {status})"
    )


def check(faults: list[Fault]) -> int:
    """Apply all in memory, print those that are stale, return the exit status."""
    stale = 0
    for fault in faults:
        try:
            broken(fault)
        except StaleFaultError as error:
            stale += 1
            print(f"{fault.name}: {error}")
    print(f"{len(faults) - stale} of {len(faults)} apply")
    return 1 if stale else 0


def main(arguments: list[str]) -> int:
    """Apply all that are asked for, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="faults whose name has one of these")
    parser.add_argument("--room", nargs="+", choices=ROOMS, default=list(ROOMS), help="faults of these rooms")
    parser.add_argument("--list", action="store_true", help="print them, and apply none")
    parser.add_argument("--check", action="store_true", help="apply each in memory, and run no test")
    asked = parser.parse_args(arguments)
    of_rooms = [fault for room in asked.room for fault in ROOMS[room]]
    chosen = [fault for fault in of_rooms if not asked.words or any(word in fault.name for word in asked.words)]
    if asked.list:
        for room in asked.room:
            print(
                f"{room}:",
                *(f"    {fault.name} ({fault.function})" for fault in ROOMS[room] if fault in chosen),
                sep="\n",
            )
        return 0
    if asked.check:
        return check(chosen)
    print("| fault | where | goes red |\n| --- | --- | --- |", flush=True)
    wrong = 0
    with ProcessPoolExecutor(WORKERS, FORK) as pool:
        for fault, outcome in zip(chosen, pool.map(apply, chosen), strict=True):
            wrong += not outcome.startswith("`")
            print(f"| {fault.name} | `{fault.function}` | {outcome} |", flush=True)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} killed", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
