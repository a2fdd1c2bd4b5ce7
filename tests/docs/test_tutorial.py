"""The tutorial from its first command to its last, on real processes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from engine.signals import EXIT_STATUS
from tests.kit.hosts import Started, until
from tests.kit.pages import blocks, commands, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PAGE = "docs/tutorial.md"
UPDATES = 8 * 16  # 2,000 samples in windows of 128


def printed(command: list[str], folder: Path) -> str:
    with Started(command, folder) as started:
        assert started.wait(120) == 0, started.output
        return started.output


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


def test_the_tutorial(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    alone, two, start, go_on, report, plan, check, *on_hosts = commands(PAGE)
    windows, interruption = (block.splitlines() for block in blocks(PAGE, "text"))

    of_one, of_two = printed(alone, tmp_path), printed(two, tmp_path)
    assert windows[0] in of_one
    assert windows[1] in of_two
    assert losses(of_one) == pytest.approx(losses(of_two), abs=2e-4)
    assert len(losses(of_one)) == 4

    history = tmp_path / "runs" / "sums" / "metrics.jsonl"
    with Started(start, tmp_path) as started:
        until(lambda: history.exists() and len(history.read_text().splitlines()) > 20, 60, "20 updates")
        started.process.send_signal(signal.SIGINT)
        assert started.wait(60) == EXIT_STATUS, started.output
        said = re.sub(r"\d+", "n", interruption[0])
        assert said in re.sub(r"\d+", "n", started.output)
    assert len(history.read_text().splitlines()) < UPDATES
    assert "P 4 x N 32 x K 1 = effective batch 128" in printed(go_on, tmp_path)
    records = [json.loads(line) for line in history.read_text().splitlines()]
    assert [record["update"] for record in records if "loss" in record] == list(range(1, UPDATES + 1))

    printed(report, tmp_path)
    assert (tmp_path / "runs" / "sums" / "report.html").exists()
    assert "16 processes" in printed(plan, tmp_path)
    assert "Nothing was written." in printed(check, tmp_path)
    scripts = [word for command in on_hosts for word in command if word.endswith(".sh")]
    assert scripts == ["launch/clusters/host.sh", "launch/clusters/slurm.sh"]
