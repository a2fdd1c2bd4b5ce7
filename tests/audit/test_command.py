"""The command: a table, Markdown and JSON, and a status that says whether the trainer is exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from engine.audit.__main__ import main
from tests.kit.pages import blocks
from tests.kit.processes import run

PAGE = "docs/audit.md"


@pytest.mark.parametrize(("cases", "status"), [(["even"], 0), (["even", "padded tokens"], 1)])
def test_a_loop_of_the_docs(
    cases: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_loop", None)
    (tmp_path / "my_loop.py").write_text(blocks(PAGE)[0])
    files = [f"--markdown={tmp_path}/found.md", f"--json={tmp_path}/found.json"]
    assert main(["my_loop:train", "--processes", "2", "--cases", *cases, *files]) == status
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["case"] for row in rows] == cases
    assert [row["verdict"] for row in rows] == ["exact", "mean of means"][: len(cases)]
    assert rows[0]["error"] < 1e-14
    assert rows[0]["reduced_bytes"] == 8 * 109
    table = (tmp_path / "found.md").read_text().splitlines()
    assert len(table) == 2 + len(cases)
    assert all(case in printed for case in cases)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere:train"], "No module named 'nowhere'"),
        (["tests.kit.broken_loops:nothing"], "has no attribute 'nothing'"),
        (["tests.kit.broken_loops:train", "--processes", "5"], "processes=5: expected one of 1, 2, 3, 4."),
        (["tests.kit.broken_loops:train", "--cases", "odd"], "cases='odd': expected some of even, short last window"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_test_of_the_docs_passes_for_what_it_claims(tmp_path: Path) -> None:
    loop, test = blocks(PAGE)[:2]
    (tmp_path / "my_loop.py").write_text(loop)
    (tmp_path / "test_my_loop.py").write_text(test)
    assert run(1, lambda: int(pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)])), group=False) == [0]
