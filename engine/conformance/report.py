"""Runs the checks on a backend, and prints a table of the promises."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engine.conformance import contract, keeping, runs, traffic
from engine.conformance.backend import Backend, BrokenPromiseError, NotDeclaredError

CHECKS: dict[str, Callable[[Backend], None]] = {
    name.removeprefix("check_"): check
    for module in (contract, traffic, runs, keeping)
    for name, check in vars(module).items()
    if name.startswith("check_")
}
"""The checks by name, in order."""


class Promise(NamedTuple):
    """A promise, whether it is kept, broken, or not declared, and what was seen if it is broken."""

    name: str
    text: str
    verdict: str
    seen: str = ""


def run_checks(backend: Backend, only: Sequence[str] = ("",)) -> Iterator[Promise]:
    """Run the checks whose name has one of the words `only` in it, and yield the promise of each."""
    for name, check in CHECKS.items():
        if any(word in name for word in only):
            promise = Promise(name.replace("_", " "), (check.__doc__ or "").splitlines()[0], "kept")
            try:
                check(backend)
            except NotDeclaredError as reason:
                promise = promise._replace(text=str(reason), verdict="not declared")
            except Exception as error:
                kind = "" if isinstance(error, BrokenPromiseError) else f"{type(error).__name__}: "
                promise = promise._replace(verdict="broken", seen=f"{kind}{error}")
            yield promise


def table(promises: Sequence[Promise]) -> str:
    """Return what was seen of broken promises, a row for each promise, and how many have each verdict."""
    seen = [f"{p.name}: {p.seen}\n" for p in promises if p.seen]
    width = max(len(promise.name) for promise in promises)
    rows = [f"{p.verdict:<12}  {p.name:<{width}}  {p.text}" for p in promises]
    counts = Counter(p.verdict for p in promises)
    sums = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("kept", "broken", "not declared"))
    return "\n".join([*seen, *rows, "", f"{len(promises)} promises: {sums}."])
