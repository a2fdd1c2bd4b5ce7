"""The table of promises in docs/testing.md is that of the folders, tests share the kit alone, `--changed` runs few."""

from __future__ import annotations

import re
import subprocess
import sys
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


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="--changed asks git")
def test_the_tests_of_what_has_changed_run_and_no_others(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path], check=True)
    with Path(tmp_path, "tests/docs/test_promises.py").open("a") as file:
        file.write("# changed\n")
    command = [sys.executable, "-m", "pytest", "--changed", "--numprocesses=2", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert re.search(rf"\D{2 + len(promises())} passed", done.stdout), done.stdout + done.stderr
