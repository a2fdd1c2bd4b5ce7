"""The table of faults: each one applies, names tests that exist, and stands in the file of its room."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.faults.fault import Fault, StaleFaultError, broken, locate
from tests.faults.rooms import FAULTS, ROOMS
from tests.kit import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies(fault: Fault) -> None:
    broken(fault)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_names_tests_that_exist(fault: Fault) -> None:
    selection, *keyword = shlex.split(fault.tests)
    path, _, name = selection.partition("::")
    named = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
    if name:
        assert name.partition("[")[0] in named
    elif keyword:
        assert any(keyword[1] in test for test in named)
    else:
        assert named


def test_a_fault_stands_in_the_file_of_its_room() -> None:
    for room, faults in ROOMS.items():
        for fault in faults:
            package, *path = locate(fault.function)[0].file.relative_to(ROOT).parts
            assert room == (path[0] if len(path) > 1 else package), fault.name


def test_the_examples_of_the_docs_are_faults() -> None:
    rows = re.findall(r"^\| (.*) \| `(\S+)` \| `\S+` \|$", (ROOT / "docs/testing.md").read_text(), re.MULTILINE)
    assert rows
    assert {*rows} <= {(fault.name, fault.function) for fault in FAULTS}


def fault(function: str, old: str = "1", new: str = "2") -> Fault:
    return Fault("", function, old, new, "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file, text in {
        "engine/__init__.py": "VERSION = 1\n",
        "engine/a.py": "ONE = 1\n\n\ndef twice():\n    return 1\n",
        "engine/room/b.py": "@cache(1)\ndef first():\n    pass\n\n\ndef twice():\n    def inner():\n        return 1\n",
        "strategies/c.py": (
            "class C:\n    @property\n    def p(self):\n        return 1\n\n"
            "    @p.setter\n    def p(self, value):\n        self.q = value\n"
        ),
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("function", "old", "file", "text"),
    [
        ("engine.a:twice", "1", "engine/a.py", "ONE = 1\n\n\ndef twice():\n    return 2\n"),
        ("engine.room.b:", "cache(1)", "engine/room/b.py", "@2\ndef first"),
        ("first", "1", "engine/room/b.py", "@cache(2)\n"),
        ("twice.inner", "1", "engine/room/b.py", "        return 2\n"),
        ("C.p", "1", "strategies/c.py", "        return 2\n"),
        ("C.p", "value\n", "strategies/c.py", "        self.q = 2"),
        ("C", "1", "strategies/c.py", "        return 2\n"),
        ("engine:", "1", "engine/__init__.py", "VERSION = 2\n"),
    ],
)
def test_a_fault_changes_its_function_alone(root: Path, function: str, old: str, file: str, text: str) -> None:
    path, changed = broken(fault(function, old), root)
    assert path == root / file
    assert text in changed
    assert changed.replace("2", old, 1) == path.read_text()


@pytest.mark.parametrize(
    ("function", "old", "new", "message"),
    [
        ("twice", "1", "2", "'twice' is in several modules. Use one of engine.a:twice, engine.room.b:twice."),
        ("engine.c:twice", "1", "2", "'engine.c:twice' is missing. Similar: twice."),
        ("D.p", "1", "2", "'D.p' is missing. Similar: C.p."),
        ("thrice", "1", "2", "'thrice' is missing. Similar: twice."),
        ("engine.b:", "1", "2", "'engine.b:' is missing. Similar: engine.a:"),
        ("first", "3", "2", "'3' stands 0 times in first"),
        ("C.p", "value", "2", "'value' stands 2 times in C.p"),
        ("first", "1", ")", "')' in first: "),
    ],
)
def test_a_stale_fault_says_why(root: Path, function: str, old: str, new: str, message: str) -> None:
    with pytest.raises(StaleFaultError, match=re.escape(message)):
        broken(fault(function, old, new), root)
