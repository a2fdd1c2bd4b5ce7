"""A plan is what the run does, update by update; and its warnings."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from engine import GradientAccumulationScheduler, Trainer
from engine.preview.preview import Preview
from engine.preview.table import print_plan, size
from strategies.environment import as_if_started
from tests.kit.planned import PlannedUpdate, planned_updates
from tests.kit.processes import on_processes
from tests.kit.reference import Regression

SAMPLES, N = 45, 4


class WithLR(Regression):
    """Its learning rate warms up and decays over exactly the updates to come; it counts its micro-batches."""

    warmup = 3

    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer, total = torch.optim.SGD(model.parameters(), lr=0.01), self.total_updates or 100
        return optimizer, LambdaLR(optimizer, lambda u: min((u + 1) / self.warmup, 1 + math.cos(math.pi * u / total)))


class Groups(WithLR):
    """Orders groups of samples, others in each epoch."""

    def order(self, epoch: int) -> list[list[int]]:
        edges = [0, *range(1 + epoch % 2, SAMPLES, 3), SAMPLES]
        return [list(range(start, stop)) for start, stop in pairwise(edges)]


class Stream(WithLR):
    def train_data(self) -> Any:
        return torch.utils.data.DataLoader(super().train_data(), batch_size=N)


def by(scheduling: dict[int, int], unit: Any = "epoch", **options: Any) -> dict[str, Any]:
    return {"callbacks": GradientAccumulationScheduler(scheduling, unit), "max_epochs": 5, **options}


CASES: dict[str, dict[str, Any]] = {
    "by epoch": by({0: 3, 2: 2, 4: 1}),
    "by update": by({0: 1, 7: 3, 8: 2}, "update"),
    "by sample": by({0: 2, 60: 1, 61: 4}, "sample"),
    "max_updates": by({0: 3, 2: 2, 4: 1}, max_updates=12),
    "max_updates alone": by({0: 3, 2: 2}, max_epochs=None, max_updates=11),
    "effective_batch_size": {"effective_batch_size": 20, "max_epochs": 2},
    "larger than an epoch": {"accumulate_grad_batches": 20, "max_epochs": 3},
    "spread": by({0: 3, 1: 2}, max_epochs=2, spread_windows=True),
}


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize(("task", "name"), [*((WithLR, name) for name in CASES), (Groups, "by epoch")])
def test_the_plan_is_what_the_run_does(task: type[Regression], name: str, P: int, tmp_path: Path) -> None:
    case = CASES[name]
    with as_if_started(P):
        plan = Preview(Trainer("single" if P == 1 else "ddp", micro_batch_size=N, **case), task(SAMPLES))
        updates, stretches = list(planned_updates(plan)), plan.stages
        sent = plan.strategy.bytes_to_reduce(plan.model)

    @on_processes(P, group=P > 1)
    def seen() -> int:
        run_dir, own = str(tmp_path / "run"), task(SAMPLES)
        Trainer("single" if P == 1 else "ddp", micro_batch_size=N, run_dir=run_dir, **case).fit(own)
        return len(own.seen)

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [as_recorded(update) for update in updates] == [
        {name: record[name] for name in as_recorded(updates[0])} for record in records if "loss" in record
    ]
    assert sum(update.micro_batches for update in updates) == sum(seen)
    assert sum(update.turns for update in updates) == max(seen)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (sent, len(updates)) == (summary["bytes_reduced_per_update"], summary["updates"])
    for stage in stretches:
        own = [update for update in updates if update.stage == stage.stage]
        assert (stage.updates, stage.epochs) == (len(own), (own[0].epoch, own[-1].epoch))
        assert stage.samples == sum(update.effective_batch for update in own)
        assert stage.micro_batches == sum(update.micro_batches for update in own)
        assert stage.turns == sum(update.turns for update in own)
        assert (stage.last_window, stage.lr) == (own[-1].effective_batch, (own[0].lr, own[-1].lr))


def as_recorded(update: PlannedUpdate) -> dict[str, Any]:
    names = ("update", "epoch", "samples", "effective_batch", "lr")
    return {
        **{name: getattr(update, name) for name in names},
        "accumulate_grad_batches": update.stage.accumulate_grad_batches,
    }


def test_a_plan_of_the_user_s_example_for_64_processes() -> None:
    with as_if_started(64):
        options = by({0: 8, 4: 4, 8: 1}, max_epochs=12)
        plan = Preview(Trainer(micro_batch_size=2, **options), WithLR(1500))
        stages = [(s.epochs, s.stage.accumulate_grad_batches, s.stage.effective_batch) for s in plan.stages]
    assert stages == [((0, 3), 8, 1024), ((4, 7), 4, 512), ((8, 11), 1, 128)]
    assert [s.updates for s in plan.stages] == [4 * 2, 4 * 3, 4 * 12]
    assert [s.last_window for s in plan.stages] == [1500 - 1024, 1500 - 2 * 512, 1500 - 11 * 128]
    assert [s.micro_batches for s in plan.stages] == [4 * 750] * 3
    assert [s.turns for s in plan.stages] == [4 * (8 + 4), 4 * (4 + 4 + 4), 4 * 12]


def test_a_plan_of_a_billion_updates() -> None:
    task = WithLR(SAMPLES)
    task.warmup = 10**8
    options = by({0: 1, 10**9 - 10: 2}, "update", max_epochs=None, max_updates=10**9)
    plan = Preview(Trainer("single", micro_batch_size=N, **options), task)
    assert [s.updates for s in plan.stages] == [10**9 - 10, 10]
    assert plan.stages[0].lr[0] == 0.01 / 10**8
    assert plan.lrs(5 * 10**8) == pytest.approx(0.01)  # half of the cosine
    assert "1,000,000,000 updates in all" in " ".join(printed(plan, 120).split())


def test_a_learning_rate_that_would_take_too_many_steps_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps(Regression):
        def configure_optimizer(self, model: nn.Module) -> Any:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)

    trainer = Trainer("single", micro_batch_size=N, max_epochs=1)
    assert Preview(trainer, Steps(SAMPLES)).stages[0].lr == (0.01, pytest.approx(1e-5))
    monkeypatch.setattr("engine.preview.preview.MOST_STEPS", 11)
    plan = Preview(trainer, Steps(SAMPLES))
    assert plan.stages[0].lr == (None, None)
    assert "?" in printed(plan, 120)


def test_a_plan_of_many_stages_shows_the_first_and_the_last() -> None:
    options = by({update: 1 + update % 3 for update in range(0, 900, 2)}, "update", max_epochs=None, max_updates=900)
    text = printed(Preview(Trainer("single", micro_batch_size=N, **options), Regression(SAMPLES)), 120)
    assert len(text.splitlines()) < 150
    assert "Left out: 410 stages" in text


def test_a_plan_changes_nothing_of_the_trainer() -> None:
    trainer = Trainer("single", micro_batch_size=N, max_epochs=1)
    trainer.fit(WithLR(SAMPLES))
    model, update = trainer.model, trainer.update
    Preview(trainer, WithLR(9))
    assert trainer.model is model
    assert trainer.update == update == trainer.total_updates


class Normed(WithLR):
    def configure_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


class SlowToWarm(WithLR):
    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return optimizer, LambdaLR(optimizer, lambda u: min(1.0, (u + 1) / 1000))


class Follows(WithLR):
    """Its learning rate is doubled where the effective batch is."""

    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return optimizer, LambdaLR(optimizer, lambda u: 2.0 if u >= 12 else 1.0)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        (WithLR, {"max_epochs": 2}, []),
        (SlowToWarm, {"max_epochs": 2}, ["the learning rate still rises at the last of 24 updates"]),
        (WithLR, {"max_epochs": 5, "accumulate_grad_batches": 16}, ["a window of 64 samples is larger than an epoch"]),
        (Normed, {"max_epochs": 2, "accumulate_grad_batches": 2}, ["1 BatchNorm layers .* over a micro-batch of 4"]),
        (Normed, {"max_epochs": 2}, []),
        (Regression, by({0: 1, 1: 2}), ["the effective batch goes from 4 to 8 at epoch 1, .* does not follow"]),
        (Follows, by({0: 1, 1: 2}), []),
        (Regression, by({0: 2, 7: 1}), ["the run ends before epoch 7, where K would become 1"]),
        (Regression, {"max_epochs": 1, "max_time": 60}, ["max_time=60 may end the run before"]),
    ],
)
def test_what_a_plan_warns_of(task: type[Regression], options: dict[str, Any], expected: Sequence[str]) -> None:
    found = Preview(Trainer("single", micro_batch_size=N, **options), task(SAMPLES)).warnings()
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def printed(plan: Preview, width: int, **console: Any) -> str:
    file = io.StringIO()
    print_plan(plan, Console(file=file, width=width, highlight=False, **console))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 120])
def test_a_plan_reads_well_in_any_width(width: int) -> None:
    with as_if_started(2):
        text = printed(Preview(Trainer(micro_batch_size=N, **CASES["by epoch"]), WithLR(SAMPLES)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for value in ("0-1", "2-3", "24", "16", "8", "4", "6", "0.0033"):
        assert value in words, (value, text)
    assert "effective batch  24" in text if width == 40 else "effective" in text


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Preview(Trainer("single", micro_batch_size=N, **by({0: 1, 1: 2})), Regression(SAMPLES))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33m" in printed(plan, 80, force_terminal=True, color_system="standard")
    assert "\x1b" not in printed(plan, 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in printed(plan, 80, force_terminal=True)


def test_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a plan expected data with a length. Use --check"):
        Preview(Trainer("single", micro_batch_size=N, max_updates=9), Stream(SAMPLES))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_999, "1 MB"), (2e15, "2,000 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
