"""The two quicker selections of tests: each promise once, and the tests of what has changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.kit.selection import APPLIES, first_of_each_file, select


def test_a_changed_file_of_the_engine_is_tested_by_what_its_faults_kill() -> None:
    found = select(["engine/plan/windows.py"])
    assert APPLIES in found
    assert any(test.startswith("tests/plan/test_plan.py") for test in found)
    assert all(Path(test.partition("::")[0]).exists() for test in found)


def test_other_changed_files_are_tested_by_what_names_them() -> None:
    assert select(["tests/cli/test_modes.py", "engine/version.py", "LICENSE"]) == ["tests/cli/test_modes.py"]
    assert "tests/data/test_streams.py" in select(["tests/kit/streams.py"])
    assert select(["docs/plan.md", "launch/recipes/digits/digits.toml"]) == [
        "tests/cli",
        "tests/docs",
        "tests/packaging/test_recipes.py",
    ]


def test_a_file_that_is_selected_is_not_selected_in_parts_too() -> None:
    found = select(["engine/update/updater.py", "tests/exact/test_tokens.py"])
    assert [test for test in found if test.startswith("tests/exact/test_tokens.py")] == ["tests/exact/test_tokens.py"]


def test_the_quick_selection_is_the_first_of_each_file() -> None:
    items: Any = [SimpleNamespace(path=path, name=name) for path in "ab" for name in ("first", "second")]
    assert [(item.path, item.name) for item in first_of_each_file(items)] == [("a", "first"), ("b", "first")]
