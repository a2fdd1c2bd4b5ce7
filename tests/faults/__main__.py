"""Break the engine on purpose, one fault at a time, and see a test go red for each.

    python -m tests.faults                      # all of them, two at a time, in copies: the code stays as it is
    python -m tests.faults clip stream          # those whose name has one of these words
    python -m tests.faults --room update ddp    # those of these rooms
    python -m tests.faults --check              # apply each in memory and run no test: a second

Prints the table of docs/testing.md. Fails if a fault survives, or no longer applies because its function has changed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import tests.kit.processes  # noqa: F401 - torch, imported once: not by each pytest
from tests.faults.fault import PACKAGES, Fault, StaleFaultError, broken
from tests.faults.rooms import ROOMS
from tests.kit import ROOT

COPIED = (*PACKAGES, "launch", "tests", "pyproject.toml")
WORKERS = int(os.environ.get("TEST_WORKERS", "2"))
FORK = multiprocessing.get_context("fork")


def copy_into(folder: str) -> Path:
    """Return a copy of the code in `folder`."""
    copy = Path(folder) / "tally"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def test(copy: Path, selection: str) -> tuple[int, str]:
    """Run tests in a copy; return pytest's exit status and the name of the first that failed."""
    output = copy.parent / "output"
    process = FORK.Process(target=_test, args=(copy, selection, output))
    process.start()
    process.join()
    said = output.read_text()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", said, re.MULTILINE)
    return process.exitcode or 0, failed[1] if failed else said[-500:]


def _test(copy: Path, selection: str, output: Path) -> None:
    """Become a pytest in `copy`, as far as a test can see."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # they are this checkout's
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    status = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *shlex.split(selection)])
    sys.stdout.flush()
    os._exit(status)


def apply(fault: Fault) -> str:
    """Break a copy; return the test that went red, or what is wrong in capitals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(folder)
        try:
            file, changed = broken(fault, copy)
        except StaleFaultError as error:
            return f"NOT APPLIED: {error}"
        file.write_text(changed)
        status, red = test(copy, fault.tests)
    return f"`{red.removeprefix('tests/')}`" if status == 1 else f"SURVIVED (pytest ended with {status})"


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
    parser.add_argument("--check", action="store_true", help="apply each in memory, and run no test")
    asked = parser.parse_args(arguments)
    of_rooms = [fault for room in asked.room for fault in ROOMS[room]]
    chosen = [fault for fault in of_rooms if not asked.words or any(word in fault.name for word in asked.words)]
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
