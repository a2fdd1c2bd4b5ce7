"""Cost of a resume: each host hashes a checkpoint once, and records are read from their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine.checkpoint.files as files
import engine.records.history as history
import engine.records.run_folder as run_folder
from engine import Trainer
from engine.records.run_folder import RunFolder
from tests.kit.processes import run
from tests.kit.reference import Regression

LINES = 30_000


def resumed(path: str, hosts: list[str]) -> int:
    """Resume a run; return how many files this process has hashed."""
    hashed: list[Path] = []
    sha256 = files._sha256
    files._sha256 = lambda file: (hashed.append(file), sha256(file))[1]  # type: ignore[assignment, func-returns-value]
    trainer = Trainer("ddp", 4, max_epochs=2, run_dir=path)
    import platform

    platform.node = lambda: hosts[trainer.strategy.rank]  # type: ignore[assignment]
    trainer.fit(Regression(24))
    return len(hashed) - 3 * (trainer.strategy.rank == 0)  # without those of the last save


@pytest.mark.parametrize(("hosts", "hashed"), [("aaa", [3, 0, 0]), ("aab", [3, 0, 3]), ("aba", [3, 3, 0])])
def test_one_process_of_each_host_hashes_a_checkpoint(tmp_path: Path, hosts: str, hashed: list[int]) -> None:
    run(3, lambda: Trainer("ddp", 4, max_epochs=1, run_dir=str(tmp_path / "run")).fit(Regression(24)))
    assert run(3, resumed, str(tmp_path / "run"), list(hosts)) == hashed


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("undone", [0, 10, 25_000])
def test_records_are_read_from_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undone: int, linked: bool
) -> None:
    record = {"loss": 0.5, "padding": "x" * 100}
    lines = [json.dumps({"update": update, **record}) + "\n" for update in range(1, LINES + 1)]
    path = tmp_path / "metrics.jsonl"
    RunFolder(tmp_path).write("config.json", {run_folder.MARK: 1})
    path.write_text("".join(lines) + '{"update": ')
    if linked:
        (tmp_path.parent / f"{tmp_path.name}-copy").hardlink_to(path)
    read: list[Any] = []
    loads = json.loads
    monkeypatch.setattr(history.json, "loads", lambda text: (read.append(1), loads(text))[1])
    folder = RunFolder(tmp_path, takes_over=True)
    assert folder.rewind(LINES - undone, 0) == undone
    folder.log({"update": LINES - undone + 1, "loss": 1.0})
    folder.close()
    assert len(read) < undone + 2 * history.BLOCK / len(lines[0])
    found = path.read_text().splitlines(keepends=True)
    assert found[:-1] == lines[: LINES - undone]
    assert loads(found[-1])["update"] == LINES - undone + 1
    if linked:  # another name of the old file still has all of it
        assert (tmp_path.parent / f"{tmp_path.name}-copy").read_text() == "".join(lines) + '{"update": '
