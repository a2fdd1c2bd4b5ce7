"""Count the logical lines of the named programs on a page of the docs: statements, without imports and docstrings.

python -m tests.benchmarks.logical_lines docs/optimizers.md
"""

from __future__ import annotations

import ast
import sys

from tests.kit.pages import blocks


def logical_lines(source: str) -> int:
    """Return the number of statements; a text that stands alone is a docstring."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    return sum(not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node) for node in statements)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def table(page: str) -> list[str]:
    """Return a row for each program of a page whose first line names its file."""
    programs = [block for block in blocks(page) if block.startswith("# ")]
    return [f"| `{block.split()[1]}` | {logical_lines(block)} |" for block in programs]


if __name__ == "__main__":
    print("\n".join(["| program | logical lines |", "|---|---|", *table(sys.argv[1])]))
