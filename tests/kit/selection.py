"""Fewer tests: some cases of each in the whole suite, the first of each file, or those of what git says has changed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable

import pytest

from tests.faults.fault import StaleFaultError, locate
from tests.faults.rooms import FAULTS
from tests.kit import ROOT

APPLIES = "tests/faults/test_faults.py::test_a_fault_applies"
OF_FOLDERS = {
    "docs/": ["tests/docs"],
    "README.md": ["tests/docs"],
    "CONTRIBUTING.md": ["tests/docs"],
    "launch/recipes/": ["tests/packaging/test_recipes.py", "tests/cli"],
    "launch/clusters/": ["tests/packaging/test_clusters.py"],
    "launch/": ["tests/cli"],
}
"""The tests of files outside the packages, by the first path prefix that matches."""


def changed_files() -> list[str]:
    """Return what differs from the last commit; where nothing does, what that has changed."""

    def said(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    now = said("diff", "--name-only", "HEAD") + said("ls-files", "--others", "--exclude-standard")
    return now or said("diff", "--name-only", "HEAD~1", "HEAD")


def select(changed: Iterable[str]) -> list[str]:
    """Return the tests of these files: themselves, those that their faults name, or else those that import them."""
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "tests").glob("*/test_*.py"))}
    by_file: dict[str, set[str]] = {}
    for fault in FAULTS:
        try:
            broken = str(locate(fault.function)[0].file.relative_to(ROOT))
        except StaleFaultError:
            continue  # test_a_fault_applies says so
        by_file.setdefault(broken, {APPLIES}).update(re.findall(r"tests/[\w/]+\.py(?:::\w+)?", fault.tests))
    selected: set[str] = set()
    for name in changed:
        if name in texts:
            selected.add(name)
        elif name in by_file:
            selected |= by_file[name]
        elif name.endswith(".py") and name.startswith(("engine/", "strategies/", "tests/")):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            selected |= {test for test, text in texts.items() if re.search(rf"\b{re.escape(module)}\b", text)}
        else:
            selected.update(next((tests for start, tests in OF_FOLDERS.items() if name.startswith(start)), ()))
    return sorted(test for test in selected if "::" not in test or test.partition("::")[0] not in selected)


def first_of_each_file(items: list[pytest.Item]) -> list[pytest.Item]:
    return list({item.path: item for item in reversed(items)}.values())[::-1]


EVERY_CASE = {"docs", "faults", "plan"}
"""Folders whose cases are pages, faults or arithmetic, and cost little."""


def some_cases_of_each_test(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the first and the last case of each test: a folder or file that is named runs them all."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid if item.path.parent.name in EVERY_CASE else item.nodeid.partition("[")[0]
        cases.setdefault(name, []).append(item)
    kept = {id(of_one[place]) for of_one in cases.values() for place in (0, -1)}
    return [item for item in items if id(item) in kept]
