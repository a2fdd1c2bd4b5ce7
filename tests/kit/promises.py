"""Write the table of promises into docs/testing.md: the docstrings of the folders of tests/.

python -m tests.kit.promises
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.kit import ROOT

PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- promises: python -m tests.kit.promises -->\n", "<!-- end -->\n"


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring, for a cell of a table."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0].replace("|", r"\|")


def promises() -> dict[Path, list[Path]]:
    """Return the files of tests by folder, each folder a promise."""
    tests = sorted((ROOT / "tests").glob("*/test_*.py"))
    return {folder: [file for file in tests if file.parent == folder] for folder in sorted({t.parent for t in tests})}


def table() -> str:
    rows = ["| promise | `launch/test.sh` with |", "| --- | --- |"]
    rows += [f"| {first_line(folder / '__init__.py')} | `tests/{folder.name}` |" for folder in promises()]
    return "\n" + "\n".join(rows) + "\n\n"


def page(text: str) -> str:
    """Return the text of docs/testing.md with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
