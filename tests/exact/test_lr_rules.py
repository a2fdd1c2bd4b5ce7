"""Learning rates that follow the effective batch: against a reference in plain torch, resumed, and on other P."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR

from engine import Callback, GradientAccumulationScheduler, Trainer
from engine.callbacks.banner import banner
from engine.errors import CheckpointError
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, Watch, in_order, parameters

SAMPLES, EPOCHS, REFERENCE = 22, 3, 8
WINDOWS = {0: 4, 1: 8, 2: 16}
"""The effective batch of each epoch."""
FACTORS: dict[str, Callable[[float], float]] = {"none": lambda r: 1.0, "linear": lambda r: r, "sqrt": math.sqrt}

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: None,
    "cosine, which goes on from the rate before": lambda o: CosineAnnealingLR(o, 12, eta_min=0.01),
    "one cycle, which has rates of its own and moves the momentum": lambda o: OneCycleLR(o, 0.1, total_steps=13),
    "warm-up, then cosine": lambda o: SequentialLR(
        o, [LambdaLR(o, lambda n: (n + 1) / 4), CosineAnnealingLR(o, 10, eta_min=0.01)], [3]
    ),
}


class Scheduled(Regression):
    def __init__(self, scheduler: str) -> None:
        super().__init__(SAMPLES)
        self.scheduler = scheduler

    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        return (optimizer, scheduler) if scheduler else optimizer


def reference(rule: str, scheduler: str) -> tuple[list[float], Tensor]:
    """Each update is one batch; the rate that the scheduler sets on an optimizer of its own is multiplied."""
    task = Scheduled(scheduler)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduled_model = nn.Linear(1, 1)
    scheduled = torch.optim.SGD(scheduled_model.parameters(), lr=0.05, momentum=0.9)
    schedule, rates = SCHEDULERS[scheduler](scheduled), []
    for epoch in range(EPOCHS):
        for rows in in_order(SAMPLES, WINDOWS[epoch]):
            group = scheduled.param_groups[0]
            rates.append(group["lr"] * FACTORS[rule](WINDOWS[epoch] / REFERENCE))
            optimizer.param_groups[0].update(lr=rates[-1], momentum=group["momentum"])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)]).backward()
            optimizer.step()
            scheduled.step()
            if schedule is not None:
                schedule.step()
    return rates, parameters(model)


class Dies(Callback):
    def __init__(self, update: int) -> None:
        self.update = update

    def on_update_end(self, trainer: Trainer) -> None:
        if trainer.update == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(rule: str, scheduler: str, P: int, folder: str | None = None, dies_at: int = 0) -> Any:
    watch = Watch()
    trainer = Trainer(
        micro_batch_size=4 // P,
        max_epochs=EPOCHS,
        shuffle=False,
        lr_rule=rule,
        lr_reference_batch=None if rule == "none" else REFERENCE,
        callbacks=[GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), watch, Dies(dies_at)],
        run_dir=folder,
        save_every_n_updates=2 if folder else None,
    )
    trainer.fit(Scheduled(scheduler))
    return [record["lr"] for record in watch.records], parameters(trainer.model), watch.records, banner(trainer)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("rule", "P"), [("none", 1), ("linear", 1), ("linear", 2), ("sqrt", 2)])
def test_a_rule_multiplies_what_the_schedule_says(rule: str, P: int, scheduler: str) -> None:
    expected_rates, expected = reference(rule, scheduler)
    for rates, found, records, shown in run(P, fit, rule, scheduler, P):
        assert rates == pytest.approx(expected_rates, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        if rule == "none":
            assert "lr_factor" not in records[0]
            assert "lr rule" not in shown
        else:
            assert [r["lr_factor"] for r in records] == [
                FACTORS[rule](WINDOWS[r["epoch"]] / REFERENCE) for r in records
            ]
            factors = ", ".join(f"x {FACTORS[rule](B / REFERENCE):.4g} from epoch {e}" for e, B in WINDOWS.items())
            assert f"lr rule:    {rule}, learning rates are for an effective batch of {REFERENCE}: {factors}" in shown


def fit_on(P: int, folder: str, dies_at: int, before: int = 2) -> Any:
    """Go on with what `before` processes began: same settings, so micro-batches of two."""
    return fit("sqrt", "warm-up, then cosine", before, folder, dies_at)


@pytest.mark.parametrize("P", [2, 1])
def test_a_rule_is_the_same_after_a_resume_on_any_P(P: int, tmp_path: Path) -> None:
    whole = run(2, fit_on, 2, str(tmp_path / "whole"), 0)[0]
    for dies_at in (5, 9):
        with pytest.raises(ChildError):
            run(2, fit_on, 2, str(tmp_path / "parts"), dies_at)
    parts = run(P, fit_on, P, str(tmp_path / "parts"), 0)[0]
    histories = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    rates = [[record["lr"] for record in history] for history in histories]
    assert rates[0] == rates[1]
    torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=0 if P == 2 else 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_rule": "square"}, "lr_rule='square': expected one of none, linear, sqrt"),
        ({"lr_rule": "linear"}, "lr_reference_batch=None: expected the effective batch"),
        ({"lr_rule": "sqrt", "lr_reference_batch": 0}, "lr_reference_batch=0: expected"),
        ({"lr_rule": "sqrt", "lr_reference_batch": True}, "lr_reference_batch=True: expected"),
        ({"lr_reference_batch": 64}, "lr_reference_batch=64 without an lr_rule"),
    ],
)
def test_what_is_no_rule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(max_updates=1, **options)


def test_another_rule_is_another_run(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    Trainer(micro_batch_size=4, max_updates=2, run_dir=folder).fit(Regression(8))
    other = Trainer(micro_batch_size=4, max_updates=4, run_dir=folder, lr_rule="linear", lr_reference_batch=2)
    with pytest.raises(CheckpointError, match="lr_rule was none and is linear"):
        other.fit(Regression(8))
