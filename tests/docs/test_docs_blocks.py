"""Every block of code on every page: programs are run as they stand, commands are parsed.

A block of Python is a program, whose first line may name its file (`# line.py`). Those of a page are run in their order
in one folder, so that one may import those before it. A command is not run: its program must be known here, what it
gives to a run must be options, and what it names of this repository must be there.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from engine.cli.main import parse
from engine.cli.modes import split
from strategies import find
from tests.kit import ROOT
from tests.kit.pages import PAGES, blocks, commands, write_files
from tests.kit.processes import on_processes, run

TOPS = ("docs", "engine", "launch", "strategies", "tests")
PEERS = {"lightning", "accelerate", "peft"}
"""What only the programs under "Before" import; these are left out where it is not installed."""
OF_A_RUN = r"--(config|task|trainer|print_config|plan|check|help)|-h$"
"""Where launch/train.sh ends torchrun's options."""
OTHERS = {"cd", "codespell", "git", "lint-imports", "mkdocs", "mypy", "py-spy", "ruff", "source", "tensorboard"}
OTHERS |= {"launch/test.sh", "tests/gpu/run.sh", "tests/other_torch.sh", ".ci/run"}
"""Programs whose options are not ours."""


def prepare(page: str, folder: Path) -> None:
    """Put the files that a page shows into a folder, beside this repository's own."""
    for top in TOPS:
        (folder / top).symlink_to(ROOT / top)
    write_files(page, folder)


def within(folder: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))


def run_program(folder: Path, source: str) -> None:
    within(folder)
    (folder / "program.py").write_text(source)
    runpy.run_path(str(folder / "program.py"), run_name="__main__")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_programs_of_a_page_run(page: str, tmp_path: Path) -> None:
    prepare(page, tmp_path)
    for block in blocks(page):
        imported = set(re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))
        if all(find_spec(name) for name in imported & PEERS):
            run(1, run_program, tmp_path, block, group=False, seconds=100)


def check(words: list[str]) -> None:
    if "&&" in words:
        place = words.index("&&")
        check(words[:place])
        return check(words[place + 1 :])
    if re.fullmatch(r"[A-Z_]+=.*", words[0]):
        return check(words[1:])
    for word in words:
        name = word.rpartition("=")[2]
        assert name.split("/")[0] not in TOPS or "/" not in name or Path(name).exists(), f"there is no {name}"
    program, *rest = words
    if program == "launch/train.sh":
        first = next((place for place, word in enumerate(rest) if re.match(OF_A_RUN, word)), len(rest))
        parse_args([*rest[:first], "engine/run.py"])
        check_run(rest[first:])
    elif program == "torchrun":
        check_started(rest)
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program == "python":
        check_script(rest[0], rest[1:])
    elif program in ("sbatch", "launch/clusters/host.sh"):
        check_run(rest[program == "sbatch" :])
    elif program == "pip":
        check_installed(rest)
    else:
        assert program in OTHERS, "who is that? Write it into OTHERS of this file."
    return None


def check_started(arguments: list[str]) -> None:
    given = parse_args(arguments)
    (check_module if given.module else check_script)(given.training_script, given.training_script_args)


def check_module(name: str, arguments: list[str]) -> None:
    assert find_spec(name) is not None, f"there is no module {name}"
    if name == "engine.run":
        check_run(arguments)
    elif name == "launch.start":
        check_started(arguments)
    elif name == "engine.conformance":
        find(arguments[0])


def check_script(name: str, arguments: list[str]) -> None:
    assert Path(name).exists(), f"there is no {name}"
    if name == "engine/run.py":
        check_run(arguments)


def check_run(options: list[str]) -> None:
    modes, rest = split(options)
    if not modes.help:
        parse(rest)


def check_installed(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:tally-engine|\.)\[(.*)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(known), f"there is no extra {extras}"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_can_be_given(page: str, tmp_path: Path) -> None:
    prepare(page, tmp_path)
    for block in blocks(page, "toml"):
        tomllib.loads(block)

    @on_processes(1, group=False)
    def check_commands() -> None:
        within(tmp_path)
        for words in commands(page):
            try:
                check(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{shlex.join(words)}: {error}") from error

    elsewhere = "\n".join(blocks(page, "") + blocks(page, "text"))
    outside = re.findall(r"^(?:torchrun|python|pip|launch/\w+\.sh|tally) .*", elsewhere, re.MULTILINE)
    assert not outside, "commands outside of ```bash"
