"""`--plan`, `--check` and `--help`: the modes that do not train."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest

from engine import Trainer
from engine.cli.main import main, make_parser
from engine.cli.modes import OneWindow, split
from tests.kit.commands import RUN, python
from tests.kit.processes import on_processes
from tests.kit.reference import Regression, Watch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def torchrun(folder: Path, *options: str) -> str:
    done = python(RUN, *options, folder=folder, P=2)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_is_printed_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    schedule = (
        "--trainer.callbacks=engine.GradientAccumulationScheduler",
        "--trainer.callbacks.scheduling={0: 4, 1: 1}",
    )
    keeps = ("--trainer.accumulate_grad_batches=1", "--trainer.save_every_n_updates=9")
    assert main([*keeps, *schedule, "--plan.processes", "2"]) == 0
    rows = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    assert ["0", "4", "128", "12", "90", "29"] in rows  # 1,437 samples in micro-batches of 16
    assert ["1-19", "1", "32", "855", "1,710", "29"] in rows
    assert not list(tmp_path.iterdir())


def test_a_plan_under_torchrun_speaks_once_and_counts_its_processes(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "--plan").count("ddp: 2 processes") == 1
    assert not list(tmp_path.iterdir())


def test_one_process_alone_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["--plan"]) == 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_strategy_that_uses_one_process_says_so(capsys: Any) -> None:
    assert main(["--plan.processes=4", "--trainer.strategy=dp"]) == 0
    assert "strategy 'dp' shares samples with none of the 4 processes" in capsys.readouterr().out


KEEPS = ("--trainer.run_dir=run", "--trainer.save_every_n_updates=1", "--trainer.keep_best=min:loss")


@pytest.mark.parametrize("P", [1, 2])
def test_a_check_runs_one_window_and_writes_nothing(tmp_path: Path, P: int, capsys: Any) -> None:
    if P == 1:
        assert main(["--check", *KEEPS]) == 0
    lines = (capsys.readouterr().out if P == 1 else torchrun(tmp_path, "--check", *KEEPS)).splitlines()
    assert lines[-1].startswith(f"checked: one window of {P * 32} samples on {P} process")
    assert "validated on a few samples, loss 2." in lines[-1]
    assert not list(tmp_path.iterdir())


def test_a_check_of_what_cannot_be_is_one_line_and_2(capsys: Any) -> None:
    assert main(["--check", "--trainer.micro_batch_size=2000"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "micro_batch_size=2000: expected at most the 1437 samples of an epoch" in error


def test_a_check_finds_a_metric_that_no_validation_has(capsys: Any) -> None:
    assert main(["--check", "--trainer.keep_best=max:recall"]) == 2
    error = capsys.readouterr().err
    assert error == "engine/run.py: keep_best=max:recall: evaluate() returns loss, accuracy. Use one.\n"


@pytest.mark.parametrize("P", [1, 2, 3])
def test_a_check_is_one_window_on_all_processes(P: int) -> None:
    @on_processes(P, group=P > 1)
    def results() -> Any:
        watch, task = Watch(), Regression(64)
        Trainer(
            "ddp" if P > 1 else "single",
            micro_batch_size=2,
            accumulate_grad_batches=3,
            max_epochs=2,
            callbacks=[watch, OneWindow()],
        ).fit(task)
        return [record["update"] for record in watch.records], sum(map(len, watch.samples))

    assert results == [([1], 6)] * P


def test_modes_are_taken_out_of_the_arguments() -> None:
    modes, rest = split(
        ["--trainer.seed", "3", "--plan.processes=64", "--task=a.B", "--trainer.callbacks.scheduling={0: 8}"]
    )
    assert (modes.plan, modes.check, getattr(modes, "plan.processes")) == (True, False, 64)
    assert rest == ["--trainer.seed", "3", "--task=a.B", "--trainer.callbacks.scheduling={0: 8}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "--check"], "--plan and --check: expected one of them"),
        (["--plan.processes=0"], "plan.processes=0: expected a whole number of at least 1"),
        (["--plan.processes=many"], "--plan.processes: invalid int value: 'many'"),
    ],
)
def test_modes_that_cannot_be(arguments: list[str], message: str) -> None:
    with pytest.raises((ArgumentError, ValueError), match=message):
        split(arguments)


START = "The options used most"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_names_each_option_once_within_the_width(width: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [line.split()[0].split("=")[0] for line in lines[lines.index(START) :] if line[:4] == "  --"]
    first = lines[lines.index(START) : lines.index("Before and instead of training")]
    assert len([line for line in first if line[:4] == "  --"]) == 12
    offered = [action.option_strings[0] for action in make_parser()._actions]
    trainer = [name for name in offered if name.startswith("--trainer.") and not name.endswith(".help")]
    modes = ["--plan", "--plan.processes", "--check", "--help"]
    assert sorted(printed) == sorted(["--task", "--config", "--print_config", *modes, *trainer])
    assert max(map(len, lines[lines.index(START) :])) <= min(width, 110)
