"""Count the structure of the packages from their syntax trees: rooms, arrows between them, circles, lines of code.

    python -m tests.kit.structure [ROOT]  # of another checkout: its code is read, not imported

A room is a folder directly under a package, or a module at the package's root. An arrow is a pair of rooms of which one
imports the other, `if TYPE_CHECKING` and imports inside functions included. The layers in pyproject.toml decide which
arrows run back up. Where they say nothing, each arrow inside a circle counts. Circles are those of modules, and follow
the `__init__` of each package on the path of an import. A line of code holds more than a comment: docstrings count.
"""

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill

PACKAGES = ("engine", "strategies")
Arrows = set[tuple[str, str]]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def code_lines(source: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = [token for token in tokens if token.string.strip() and token.type != tokenize.COMMENT]
    lines = {number for token in code for number in range(token.start[0], token.end[0] + 1)}
    return sum(bool(line.strip()) for number, line in enumerate(source.split("\n"), 1) if number in lines)


def imports(node: ast.AST, package: list[str], typed: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names that are imported, with whether they are for the type checker alone."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, typed) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        yield from ((".".join([*base, *filter(None, [node.module]), alias.name]), typed) for alias in node.names)
    checks = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for part in ast.iter_child_nodes(node):
        yield from imports(part, package, typed or (checks and part in getattr(node, "body", [])))


def circles(arrows: Arrows) -> list[list[str]]:
    """Return the strongly connected components of more than one node, the largest first."""
    reached = {name: {end for start, end in arrows if start == name} for name, _ in arrows}
    for middle in reached:
        for ends in reached.values():
            ends |= reached[middle] if middle in ends else set()
    found = {frozenset(b for b in ends if a in reached.get(b, ())) for a, ends in reached.items()}
    return sorted((sorted(circle) for circle in found if len(circle) > 1), key=lambda circle: (-len(circle), circle))


def contracts(root: Path) -> Iterator[list[list[str]]]:
    """Yield the layers of each contract from top to bottom, each a list of modules."""
    tools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    for contract in tools.get("importlinter", {}).get("contracts", []):
        layers = [layer.replace(":", "|").split("|") for layer in contract.get("layers", [])]
        for container in contract.get("containers", [""]):
            yield [[f"{container}.{name.strip(' ()')}".lstrip(".") for name in layer] for layer in layers]


def back_up(arrows: Arrows, rules: list[list[list[str]]]) -> Arrows:
    ring = {name: number for number, circle in enumerate(circles(arrows)) for name in circle}

    def runs_up(start: str, end: str) -> bool:
        for rule in rules:
            tops, ends = ([i for i, layer in enumerate(rule) if {r, r.split(".")[0]} & {*layer}] for r in (start, end))
            if tops and ends and tops != ends:
                return ends < tops
        return start in ring and ring[start] == ring.get(end)

    return {arrow for arrow in arrows if runs_up(*arrow)}


def show(title: str, items: Iterable[str]) -> None:
    print(fill(f"{title}: {', '.join(items) or '-'}", 110, subsequent_indent="    ", break_on_hyphens=False))


def main(root: Path) -> None:
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    files = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in paths}
    lines = Counter({module: code_lines(file.read_text()) for module, file in files.items()})
    arrows, at_run_time, between = set(), set(), set()
    for module, file in files.items():
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        for name, typed in imports(ast.parse(file.read_text()), package):
            target = name if name in files else name.rpartition(".")[0]
            if target not in files or target == module:
                continue
            run = {target.rsplit(".", n)[0] for n in range(target.count(".") + 1)}
            new = {(module, name) for name in run if name == target or not f"{module}.".startswith(f"{name}.")}
            arrows |= new
            at_run_time |= set() if typed else new
            between |= {(room(module), room(target))} - {(room(target), room(target))}
    up = back_up(between, list(contracts(root)))
    row = "{:<10} {:>8} {:>6} {:>7} {:>8} {:>16} {:>12} {:>6}".format
    print(row("", "modules", "rooms", "arrows", "back up", "circles (typed)", "at run time", "lines"))
    for title, among in {**{package: {package} for package in PACKAGES}, "together": set(PACKAGES)}.items():
        ours = {module for module in files if module.split(".")[0] in among}
        counts = [sum({a.split(".")[0], b.split(".")[0]} <= among for a, b in pairs) for pairs in (between, up)]
        rings = [circles({pair for pair in pairs if {*pair} <= ours}) for pairs in (arrows, at_run_time)]
        sizes = [" + ".join(str(len(circle)) for circle in ring) or "-" for ring in rings]
        print(row(title, len(ours), len({*map(room, ours)}), *counts, *sizes, sum(lines[m] for m in ours)))
    rooms = Counter(room(module) for module, count in lines.items() for _ in range(count))
    show("lines by room", (f"{name} {count}" for name, count in rooms.most_common()))
    show("longest files", (f"{files[m].relative_to(root)} {count}" for m, count in lines.most_common(8)))
    show("back up", (f"{a} -> {b}" for a, b in sorted(up)))
    show("circles (typed)", (f"[{', '.join(circle)}]" for circle in circles(arrows)))
    show("circles at run time", (f"[{', '.join(circle)}]" for circle in circles(at_run_time)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve())
