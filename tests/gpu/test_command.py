"""`tests/gpu/run.sh`: results are written also if a part fails or takes too long; on a CPU all parts run, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.report import Part, bars, run_parts
from tests.kit import ROOT


def command(source: str) -> list[str]:
    return [sys.executable, "-S", "-c", source]


def test_a_part_that_fails_or_never_ends_hides_no_other(tmp_path: Path) -> None:
    says = "print('before'); print('{\"a\": 1}')"
    parts = [
        Part("fails", [command("raise SystemExit('no device')"), command(says)], 60),
        Part("never ends", [command("import time; print('started', flush=True); time.sleep(600)")], 2),
        Part("works", [command(says)], 60),
    ]
    assert run_parts(parts, tmp_path, "cpu") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(part["name"], part["result"]) for part in results["parts"]] == [
        ("fails", "failed"),
        ("never ends", "out of time"),
        ("works", "ok"),
    ]
    assert results["parts"][0]["found"] == [None, {"a": 1}]
    assert results["parts"][2]["found"] == [{"a": 1}]
    page = (tmp_path / "results.md").read_text()
    assert "no device" in page
    assert "| never ends | out of time |" in page
    assert run_parts(parts[2:], tmp_path, "cpu") == 0


def row(tokens: int, peak: float | None) -> dict[str, float | None]:
    return {"tokens_per_second": tokens, "peak_mib": peak}


def judged(device: str, tokens: int, peak: float, syncs: int) -> list[bool | None]:
    contenders = {"plain loop": row(100_000, 1000.0), "Tally, off": row(tokens, peak)}
    found = {"speed and memory": {"GPT-2": contenders}, "host-device syncs per update": {"8": [2, 2], "64": [2, syncs]}}
    parts = [{"name": name, "found": [values]} for name, values in found.items()]
    return [bar["holds"] for bar in bars({"machine": {"device": device}, "parts": parts})]


def test_bars() -> None:
    assert judged("NVIDIA H200", 99_000, 1010.0, 2) == [True, True, True]
    assert judged("NVIDIA H200", 98_900, 1011.0, 3) == [False, False, False]
    assert judged("cpu", 98_900, 1011.0, 3) == [None, None, None]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "tests/gpu/run.sh", tmp_path], env=environment, capture_output=True, text=True, timeout=980, cwd="/"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert {part["name"]: part["result"] for part in results["parts"]} == {
        "device tests": "ok",
        "conformance of each strategy": "ok",
        "host-device syncs per update": "ok",
        "two processes on one device": "ok",
        "trace of one window": "ok",
        "speed and memory": "ok",
    }, (tmp_path / "results.md").read_text()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trace.json").stat().st_size
    syncs = results["parts"][2]["found"][0]
    assert syncs["8"] == syncs["64"] == [2, 2, 2]
