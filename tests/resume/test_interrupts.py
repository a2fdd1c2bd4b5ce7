"""Signals: all processes stop at the same boundary with a checkpoint, and resume without a trace."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Trainer
from engine.loggers.base import Logger
from strategies import DDPStrategy
from tests.kit.killed import Counting, Full, check_samples, fit, history, same
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, Samples


def fit_under_fire(folder: str, seed: int, fires: bool) -> Any:
    """One start of a run; one process, sometimes several, is told to stop at a random moment."""
    dice = random.Random(f"{seed} {torch.distributed.get_rank()}")
    fires = fires and (seed % 2 == torch.distributed.get_rank() or dice.random() < 0.3)
    timer = threading.Timer(dice.uniform(0.0, 0.25), os.kill, (os.getpid(), signal.SIGTERM))
    original = signal.signal(signal.SIGTERM, lambda *_: None)  # before and after the run, when nothing is there to save
    if fires:
        timer.start()
    try:
        return fit(folder, strategy=DDPStrategy(timeout_seconds=20))
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, original)


@pytest.mark.parametrize("times", [12, pytest.param(50, marks=(pytest.mark.slow, pytest.mark.campaign))])
def test_sigterm_at_random_moments(tmp_path: Path, times: int) -> None:
    folder, interrupted = tmp_path / "run", 0
    expected = run(2, fit_under_fire, str(tmp_path / "whole" / "run"), 0, False)
    for number in range(times):
        results = run(2, fit_under_fire, str(folder), number, True, seconds=30)
        assert len({(bool(signal_), update) for signal_, update, *_ in results}) == 1
        interrupted += bool(results[0][0])
        if not results[0][0]:
            assert same(results, expected)
            folder = tmp_path / str(number) / "run"
    if folder.exists():
        results = run(2, fit_under_fire, str(folder), 0, False)
        assert same(results, expected)
        assert history(folder) == history(tmp_path / "whole" / "run")
        check_samples(folder, 2)
    assert interrupted > 3


class Kills(Callback):
    """Sends a signal to this process at an event."""

    def __init__(self, event: str, at: int = 0, number: int = signal.SIGTERM, rank: int = 0) -> None:
        self.at, self.number, self.rank = at, number, rank
        setattr(self, event, self.send)

    def send(self, trainer: Any) -> None:
        if trainer.update >= self.at and trainer.strategy.rank == self.rank:
            os.kill(os.getpid(), self.number)


class Interrupted(Full):
    """Is told to stop in the middle of a validation, on one process."""

    told = False

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        if self.told and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluate(model, batch)

    def validation_data(self) -> Any:
        return Samples(self.x[:11], self.y[:11])


def fit_interrupted(folder: str, told: bool) -> Any:
    task = Interrupted()
    task.told = told
    return fit(folder, task=task, strategy="ddp")


def test_sigterm_in_validation_repeats_it(tmp_path: Path) -> None:
    stopped = run(2, fit_interrupted, str(tmp_path / "run"), True, seconds=30)
    assert [(bool(signal_), update) for signal_, update, *_ in stopped] == [(True, 2)] * 2
    assert not any("validation/loss" in r for r in history(tmp_path / "run"))
    assert same(
        run(2, fit_interrupted, str(tmp_path / "run"), False),
        run(2, fit_interrupted, str(tmp_path / "o" / "run"), False),
    )
    assert history(tmp_path / "run") == history(tmp_path / "o" / "run")


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings = {"micro_batch_size": 4, "max_epochs": 2, "run_dir": str(folder), "callbacks": list(callbacks), **options}
    return Trainer("single", **settings)


@pytest.mark.parametrize("event", ["on_fit_start", "on_epoch_start", "on_update_end", "on_epoch_end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_event_stops_before_the_next_update(event: str, number: int, tmp_path: Path) -> None:
    run_ = trainer(tmp_path / "run", Kills(event, at=0, number=number))
    run_.fit(Regression(16))
    assert run_.interrupted_by == signal.Signals(number).name
    assert run_.update == {"on_update_end": 1, "on_epoch_end": 4}.get(event, 0)
    assert not (tmp_path / "run" / "summary.json").exists()
    again = trainer(tmp_path / "run")
    again.fit(Regression(16))
    assert again.update == 8


def test_a_second_sigint_raises_at_once(tmp_path: Path) -> None:
    class Twice(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run").fit(Twice(16))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Counted(Regression):
    """Its forward changes a buffer that it reads; it is told to stop in the middle of the fourth window."""

    told = True

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        if self.told and self.calls == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)


def test_a_window_that_is_dropped_leaves_no_trace_in_buffers(tmp_path: Path) -> None:
    found = []
    for folder, told in (("run", True), ("run", False), ("whole", False)):
        task = Counted(32, model=Counting)
        task.told = told
        run_ = trainer(tmp_path / folder, accumulate_grad_batches=3, micro_batch_size=2)
        run_.fit(task)
        assert bool(run_.interrupted_by) == told
        found.append(run_.model.state_dict())
    assert same(found[1], found[2])


class Draws(Counted):
    """Its loss draws from the host; it is told to stop in the second window, which is the first to find that."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch) * random.random()


def test_a_window_that_is_dropped_keeps_the_draws_that_it_found(tmp_path: Path) -> None:
    found = []
    for folder, told in (("run", True), ("run", False), ("whole", False)):
        task = Draws(32)
        task.told = told
        run_ = trainer(tmp_path / folder, accumulate_grad_batches=8, micro_batch_size=1)
        run_.fit(task)
        assert bool(run_.interrupted_by) == told
        found.append(run_.model.state_dict())
    assert same(found[1], found[2])


class DrawsRarely(Regression):
    """Its loss draws from the host at some updates; it is told to stop in the validation after the second."""

    told: bool
    draws_at: Any
    run: Any

    def loss(self, model: nn.Module, batch: Any) -> Any:
        draws = model.training and self.run.update in self.draws_at
        return super().loss(model, batch) * (random.random() if draws else 1.0)

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        if self.told and self.run.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluate(model, batch)

    def validation_data(self) -> Any:
        return self.train_data()


@pytest.mark.parametrize("draws_at", [(3,), (1, 3), range(9)])
@pytest.mark.parametrize("end", ["signal", "max_updates"])
def test_a_validation_that_ends_a_run_changes_no_draw_after_it(end: str, draws_at: Any, tmp_path: Path) -> None:
    found = []
    for folder, ends in (("run", True), ("run", False), ("whole", False)):
        task = DrawsRarely(16)
        task.told, task.draws_at = ends and end == "signal", draws_at
        options: dict[str, Any] = {"validate_every_n_updates": 2} if end == "signal" else {"max_epochs": None}
        if end == "max_updates":
            options["max_updates"] = 2 if ends else 8
        task.run = trainer(tmp_path / folder, **options)
        task.run.fit(task)
        assert bool(task.run.interrupted_by) == task.told
        assert (task.run.update == 2) == ends
        found.append(task.run.model.state_dict())
    assert same(found[1], found[2])


def test_without_a_folder_signals_are_the_user_s() -> None:
    seen = []
    original = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        run_ = Trainer("single", micro_batch_size=4, max_epochs=1, callbacks=Kills("on_update_end"))
        run_.fit(Regression(16))
    finally:
        signal.signal(signal.SIGTERM, original)
    assert len(seen) == run_.update == 4


class TellsLate(Logger):
    """Is told to stop when the run closes its loggers."""

    def log(self, record: Any) -> None:
        pass

    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_a_run_closes_is_the_run_s(tmp_path: Path) -> None:
    seen = []
    original = signal.signal(signal.SIGTERM, mine := lambda *_: seen.append(1))
    try:
        trainer(tmp_path / "run", loggers=TellsLate()).fit(Regression(16))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, original)
    assert not seen


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    class Once(Kills):
        def send(self, trainer: Any) -> None:
            if trainer.update == 2:
                os.kill(os.getpid(), signal.SIGUSR1)

    trainer(tmp_path / "run", Once("on_update_end"), keep_last_checkpoints=9).fit(Regression(16))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("update-*"))
    assert names == ["update-00000003", "update-00000008"]  # after the update that was under way; at the end


class Explodes(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        self.calls = getattr(self, "calls", 0) + 1
        return loss * torch.inf if self.calls > 6 else loss


def test_updates_that_are_not_finite_end_the_run_and_leave_the_last_good_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def fit_exploding() -> None:
        Trainer(
            "ddp",
            micro_batch_size=2,
            max_epochs=9,
            run_dir=str(folder),
            save_every_n_updates=2,
            stop_after_n_skipped=5,
        ).fit(Explodes(16))

    with pytest.raises(ChildError, match=r"5 updates in a row were not finite, up to update 11") as raised:
        run(2, fit_exploding, seconds=30)
    assert "The last good checkpoint: " + str(folder / "checkpoints" / "update-00000006") in raised.value.errors[0]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "update-00000006"
    assert [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        *[0] * 6,
        *[1, 2, 3, 4],
    ]
