"""The functions of the standard library that this Python comes with, as bytes."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
HELD_OUT = 10
"""One function of so many is held out."""


@lru_cache(maxsize=1)
def all_functions() -> list[bytes]:
    """Return the source of every function and method, one each, in a fixed order; an exact copy is taken once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not LEFT_OUT.intersection(f.relative_to(root).parts))
    return list(dict.fromkeys(source for file in files for source in _functions_of(file)))


def train_and_held_out(limit: int | None = None) -> tuple[list[bytes], list[bytes]]:
    """Return the functions to train on and those held out, of all or of `limit` that are spread over the library."""
    functions = all_functions()
    if limit is not None and limit < len(functions):
        functions = [functions[i * len(functions) // limit] for i in range(limit)]
    held_out = functions[::HELD_OUT]
    return [f for i, f in enumerate(functions) if i % HELD_OUT], held_out


def _functions_of(file: Path) -> Iterator[bytes]:
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).encode()
