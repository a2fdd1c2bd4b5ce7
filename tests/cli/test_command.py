"""The command line for real: torchrun, the recipe, the run's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.cli.main import parse
from launch.recipes.digits import Digits
from tests.kit import ROOT
from tests.kit.commands import RUN, python

SHORT = ("--trainer.max_epochs=2", "--trainer.micro_batch_size=64")


def finished(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def started(folder: Path, *words: str, **environment: str) -> str:
    """What these words print, started from nothing."""
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )
    return finished(done)


def test_torchrun_trains_digits_and_keeps_the_run(tmp_path: Path) -> None:
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", RUN)
    check_digits(tmp_path, started(tmp_path, *words, "--trainer.max_epochs=3"), epochs=3, accuracy=0.8)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / ".requirements").exists(), reason="launch/train.sh would make .venv first")
@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="with GPUs there is a process for each")
def test_the_readme_s_first_command(tmp_path: Path) -> None:
    command = [str(ROOT / "launch" / "train.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_digits(tmp_path, done.stdout, epochs=20, accuracy=0.96)


def check_digits(tmp_path: Path, printed: str, epochs: int, accuracy: float) -> None:
    updates_made = 23 * epochs
    folder = tmp_path / "runs" / "latest"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation/accuracy"] >= accuracy
    assert (summary["updates"], summary["samples"], summary["processes"]) == (updates_made, epochs * 1437, 2)
    assert (summary["all_reduces_per_update"], summary["bytes_reduced_per_update"]) == (1, 4 * 65_994)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [r for r in records if "weight" in r]
    assert [r["update"] for r in updates] == list(range(1, updates_made + 1))
    assert updates[-1]["effective_batch"] == updates[-1]["weight"] == 1437 % 64
    assert len([r for r in records if "validation/accuracy" in r]) == epochs
    weights = load_file(folder / "model.safetensors")
    Digits().configure_model().load_state_dict(weights)
    lines = printed.splitlines()
    assert "window:     P 2 x N 16 x K 2 = effective batch 64" in lines
    assert f"updates:    {updates_made} (23 per epoch of 1,437 samples)" in lines
    assert len([line for line in lines if line.startswith("task:")]) == 1  # one process speaks
    assert re.search(rf"epoch +{epochs - 1}  update +{updates_made}/{updates_made}", printed)


def test_the_resolved_options_train_the_same_again(tmp_path: Path) -> None:
    for name, options in (("first", SHORT), ("second", ("--config=runs/first/config.yaml",))):
        finished(python(RUN, *options, f"--trainer.run_dir=runs/{name}", folder=tmp_path))
        assert (tmp_path / "runs" / "latest").resolve().name == name
    first, second = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("first", "second"))
    assert all(first[name].equal(second[name]) for name in first)


MINE = (
    "--trainer.strategy=mine.Mine",
    "--trainer.strategy.bucket_cap_mb=1",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.callbacks=engine.GradientAccumulationScheduler",
    "--trainer.callbacks.scheduling={0: 4, 1: 2}",
)


@pytest.mark.parametrize("P", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_as_a_module_with_a_user_s_strategy_and_a_schedule(tmp_path: Path, P: int) -> None:
    (tmp_path / "mine.py").write_text(
        "from strategies import DDPStrategy\nclass Mine(DDPStrategy):\n    '''Mine.'''\n    name = 'mine'\n"
    )
    words = ("-m", "engine.run", *SHORT, *MINE)
    if P == 1:
        printed = started(tmp_path, *words, PYTHONPATH=str(ROOT))
    else:
        printed = finished(python(*words, folder=tmp_path, P=P))
    assert f"strategy:   mine: {P} x cpu, gloo" in printed
    records = [json.loads(line) for line in (tmp_path / "runs/latest/metrics.jsonl").read_text().splitlines()]
    assert {(r["epoch"], r["accumulate_grad_batches"]) for r in records if "weight" in r} == {(0, 4), (1, 2)}


TASKS = """
import torch
from launch.recipes.digits import Digits
class Wide(Digits):
    def __init__(self, hidden: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        print(f"hidden {hidden} lr {lr}")
"""
CONFIGS = {
    "nested.toml": '[task]\nclass_path = "tasks.Wide"\n[task.init_args]\nhidden = 8\n',
    "flat.toml": '[task]\nclass_path = "tasks.Wide"\nhidden = 8\n',
    "flat.yaml": "task: {class_path: tasks.Wide, hidden: 8}\n"
    "trainer: {callbacks: [{class_path: engine.callbacks.EMA, decay: 0.5}]}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_may_stand_beside_a_class_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / name).write_text(CONFIGS[name])
    words = ("-m", "engine.run", f"--config={name}", "--task.lr=0.5", *SHORT)
    assert "hidden 8 lr 0.5" in finished(python(*words, folder=tmp_path))
    assert ("decay: 0.5" in (tmp_path / "runs/latest/config.yaml").read_text()) == name.endswith("yaml")


def test_a_list_of_one_is_a_list() -> None:
    """TOML alone would take it for the name of an empty table: a Callback that does nothing."""
    trainer = parse(["--trainer.callbacks=[engine.callbacks.EMA]", "--trainer.loggers= [csv]"])[1].trainer
    assert [callback.class_path for callback in trainer.callbacks] == ["engine.callbacks.EMA"]
    assert trainer.loggers == ["csv"]


def test_dp_on_the_cpu(tmp_path: Path) -> None:
    options = ("--trainer.strategy=strategies.DPStrategy", "--trainer.strategy.devices=3")
    printed = finished(python(RUN, *SHORT, *options, folder=tmp_path))
    assert "strategy:   dp: each micro-batch split over 3 cpu devices" in printed


def test_help_and_print_config(tmp_path: Path) -> None:
    assert "--trainer.accumulate_grad_batches" in finished(python(RUN, "--help", folder=tmp_path))
    assert "class_path: launch.recipes.digits.Digits" in finished(python(RUN, "--print_config", folder=tmp_path))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not (ROOT / ".venv" / ".requirements").exists(), reason="launch/train.sh would make .venv first")
def test_a_refusal_under_torchrun_is_one_line() -> None:
    done = subprocess.run(
        [str(ROOT / "launch" / "train.sh"), "--trainer.strategy=dp"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("engine/run.py: strategy='dp': expected one process, but 2 were started")
    assert len(done.stderr.splitlines()) == 1, done.stderr
