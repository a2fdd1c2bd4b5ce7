"""Commands as they are typed, in forks of this process: what is imported here already need not be imported again.

Importing torch is most of what a short command costs. That commands also work from nothing is what some of
tests/cli/test_command.py show, and the slow tests of torchrun, clusters and packaging.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import sklearn.datasets  # noqa: F401 - the first recipe's: once here, not in each process

from engine.conformance.processes import run
from tests.kit import ROOT

RUN = str(ROOT / "engine" / "run.py")


def python(*words: str, folder: Path, P: int = 1, seconds: float = 100) -> CompletedProcess[str]:
    """Do what `python *words` would do in `folder`; for P > 1 `torchrun --nproc_per_node=P *words`."""
    with TemporaryDirectory() as kept:
        output = [Path(kept) / name for name in ("stdout", "stderr")]
        status = max(run(P, _interpret, words, folder, output, seconds=seconds))
        return CompletedProcess(words, status, *(path.read_text() for path in output))


def _interpret(words: tuple[str, ...], folder: Path, output: list[Path]) -> int:
    """Become the interpreter of these words, as far as a program can see; return its exit status."""
    if os.environ["WORLD_SIZE"] == "1":
        for name in [
            name for name in os.environ if re.match("RANK|LOCAL_RANK|.*WORLD_SIZE|MASTER_|TORCHELASTIC_", name)
        ]:
            del os.environ[name]
    else:
        os.environ["TORCHELASTIC_RUN_ID"] = output[
            0
        ].parent.name  # the same for its processes, and for no other command
    os.chdir(folder)
    sys.stdout, sys.stderr = (path.open("a", buffering=1) for path in output)
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        os.dup2(stream.fileno(), number)
    is_module = words[0] == "-m"
    sys.argv = list(words[is_module:])
    sys.path = [str(folder if is_module else Path(words[0]).parent), str(ROOT), *sys.path]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
