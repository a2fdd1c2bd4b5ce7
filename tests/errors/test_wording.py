"""Messages of the command line: one line each, with a way out, in words of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main

SCHEDULER = "--trainer.callbacks=engine.GradientAccumulationScheduler"
DIGITS = ("--task=launch.recipes.digits.Digits", "--trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accumulate_grad_batches=2.5"], "--trainer.accumulate_grad_batches: expected int, got 2.5"),
        (["--trainer.gradient_clip_norm=x"], "--trainer.gradient_clip_norm: expected float, got x"),
        (["--trainer.micro_batch_size=x"], "--trainer.micro_batch_size: expected int, got x"),
        (
            ["--trainer.strategy.timeout_seconds=3"],
            "--trainer.strategy: expected a class for its options, got auto. Use module.Class",
        ),
        (["--trainer.max_epoch=3"], "there is no option trainer.max_epoch. Did you mean --trainer.max_epochs? --help"),
        (
            ["--trainer.max_epoch", "3"],
            "there is no option trainer.max_epoch. Did you mean --trainer.max_epochs? --help",
        ),
        (["--plan.procs=3"], "there is no option plan.procs. Did you mean --plan.processes?"),
        (["--plan=3"], "--plan: takes no value, but was given '3'"),
        (["extra"], "'extra' is not an option. Write --name=value; --help lists them."),
        (["--config=typo.toml"], "there is no option trainer.max_epoch. Did you mean --trainer.max_epochs?"),
        (["--config=broken.toml"], "this is neither TOML (Expected ']' at the end of a table declaration (at line 1"),
        (["--config=none.toml"], "--config: File does not exist"),
        (["--task=nope.Nope"], "--task: nope.Nope: No module named 'nope'. Name a class as module.Class;"),
        (["--task=engine.Trainer"], "--task: engine.Trainer is not a subclass of Task"),
        ([*DIGITS, "--task.lrr=3"], "--task: launch.recipes.digits.Digits has no option 'lrr'. --task.help=launch."),
        ([SCHEDULER], "the following arguments are required: scheduling"),
        ([SCHEDULER, "--trainer.callbacks.scheduling=8"], "scheduling: expected dict, got 8"),
        (
            [SCHEDULER, "--trainer.callbacks.scheduling={0: 0}"],
            "scheduling[0]=0: expected a whole number of at least 1. Use 1",
        ),
        ([DIGITS[0]], "max_epochs=None, max_updates=None: expected an end. Give one, such as max_epochs=10."),
    ],
)
def test_a_message_says_what_to_do(
    options: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.toml").write_text("[trainer]\nmax_epoch = 3\n")
    (tmp_path / "broken.toml").write_text("[trainer\nmax_epochs = 3\n")
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("engine/run.py: ")
    assert message in error
    assert len(error.splitlines()) == 1
    for noise in ("Parser key", "<class", "Given value", "Union", "Namespace", "NestedArg", "typing"):
        assert noise not in error
