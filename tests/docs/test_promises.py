"""The table of promises in docs/testing.md is that of the folders, and tests share nothing but the kit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.kit.promises import PAGE, first_line, page, promises


def test_the_docs_have_the_table() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), "run `python -m tests.kit.promises`"


@pytest.mark.parametrize("folder", promises(), ids=lambda folder: folder.name)
def test_a_folder_is_a_promise(folder: Path) -> None:
    assert first_line(folder / "__init__.py").endswith(".")
    assert all(first_line(file) for file in promises()[folder])


def test_tests_import_nothing_from_one_another() -> None:
    for file in sorted((ROOT / "tests").rglob("*.py")):
        imported = re.findall(r"^ *(?:from|import) (tests\.\w+\.test_\w+|test_\w+)", file.read_text(), re.MULTILINE)
        assert not imported, f"{file}: tests share what stands in tests/kit"
