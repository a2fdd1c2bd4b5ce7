"""The pages of the docs, and the blocks of code on them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.kit import ROOT
from tests.kit.commands import python

PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]


def blocks(page: str, language: str = "python") -> list[str]:
    """Return the blocks of code of a page that are in this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def printed(*words: str, folder: Path, P: int = 1, seconds: float = 100) -> str:
    done = python(*words, folder=folder, P=P, seconds=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_files(page: str, folder: Path) -> None:
    """Write what a page shows of files."""
    for block in [*blocks(page), *blocks(page, "toml")]:
        if named := re.match(r"# (\w+\.\w+)\n", block):
            (folder / named[1]).write_text(block)


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page, each as its words."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
