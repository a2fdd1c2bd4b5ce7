"""A fault: what it breaks, and where that stands in the code."""

from __future__ import annotations

import ast
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from tests.kit import ROOT

PACKAGES = ("engine", "strategies")


class Fault(NamedTuple):
    """A fault: `old`, which stands once in `function`, becomes `new`, and one of `tests` must fail.

    `function` is the qualified name of a function or class in `engine/` or `strategies/`, such as "Plan.windows". If
    several modules have the name, their path comes first: "engine.order:shuffled". "engine.order:" is the whole module.
    """

    name: str
    function: str
    old: str
    new: str
    tests: str


class StaleFaultError(ValueError):
    """A fault does not apply: its function or its text is missing, or there are several."""


class Definition(NamedTuple):
    """A function or class: its module, and its text from `start` to `end`, decorators included."""

    module: str
    file: Path
    start: int
    end: int


@lru_cache(maxsize=1)
def definitions(root: Path) -> dict[str, list[Definition]]:
    """Return the functions and classes of the packages in `root` by qualified name, and each module as "path:"."""
    found: dict[str, list[Definition]] = {}

    def visit(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                visit(node, prefix)
                continue
            first = min(part.lineno for part in (node, *node.decorator_list))
            assert node.end_lineno is not None
            found.setdefault(prefix + node.name, []).append(
                Definition(module, file, lines[first - 1], lines[node.end_lineno])
            )
            visit(node, f"{prefix}{node.name}.")

    for file in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        source = file.read_text()
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        lines = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        found[f"{module}:"] = [Definition(module, file, 0, len(source))]
        visit(ast.parse(source), "")
    return found


def locate(function: str, root: Path = ROOT) -> list[Definition]:
    """Return the definitions of `function`, all in one module: several for a property and its setter, say.

    Raises StaleFaultError if there is no such function, or if several modules have one.
    """
    known = definitions(root)
    module, colon, name = function.rpartition(":")
    if not name:
        places = known.get(function, [])
    else:
        places = [place for place in known.get(name, []) if not colon or place.module == module]
    modules = sorted({place.module for place in places})
    if len(modules) > 1:
        choices = ", ".join(f"{module}:{name}" for module in modules)
        raise StaleFaultError(f"{function!r} is in several modules. Use one of {choices}.")
    if not places:
        last = name.rpartition(".")[2]
        same = [other for other in known if last and other.rpartition(".")[2] == last]
        similar = same or get_close_matches(name or function, known)
        raise StaleFaultError(f"{function!r} is missing. Similar: {', '.join(similar) or 'nothing'}.")
    return places


def broken(fault: Fault, root: Path = ROOT) -> tuple[Path, str]:
    """Return the file of `root` that has the fault, and its text with the fault.

    Raises StaleFaultError if the fault does not apply, or if Python cannot read the result.
    """
    places = locate(fault.function, root)
    file = places[0].file
    source = file.read_text()
    counts = [source.count(fault.old, place.start, place.end) for place in places]
    if sum(counts) != 1:
        raise StaleFaultError(f"{fault.old!r} stands {sum(counts)} times in {fault.function}, in {file}")
    start = source.index(fault.old, places[counts.index(1)].start)
    changed = source[:start] + fault.new + source[start + len(fault.old) :]
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise StaleFaultError(f"{fault.new!r} in {fault.function}: {error}") from error
    return file, changed
