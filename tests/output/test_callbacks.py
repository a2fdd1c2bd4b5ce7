"""The callbacks that come with the engine: what they do, that a resume does not show, and the order of hooks."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from engine import Callback, Loss, Trainer
from engine.callbacks import EMA, EarlyStopping, EpochLR, PlateauLR, Profiler
from strategies import DDPStrategy
from tests.kit.killed import same
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, Samples, data, parameters


class Scripted(Regression):
    """Validates to the values of a script, one after another."""

    def __init__(self, script: list[float], samples: int = 16) -> None:
        super().__init__(samples)
        self.script = script

    def validation_data(self) -> Any:
        return Samples(*data(3))

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        value = self.script[self.trainer.update - 1]
        return {"loss": Loss(torch.tensor(value * len(batch[0])), len(batch[0]))}


class Knows(Callback):
    """Gives the task its trainer, and keeps what each update's learning rate was."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_fit_start(self, trainer: Any) -> None:
        trainer.task.trainer = trainer

    def on_update_end(self, trainer: Trainer) -> None:
        self.rates.append(trainer.record["lr"])


def fit_scripted(callback: Any, script: list[float], **options: Any) -> Any:
    knows = Knows()
    trainer = Trainer(
        **{"micro_batch_size": 2, "max_updates": len(script), "validate_every_n_updates": 1, **options},
        callbacks=[knows, callback] if callback else knows,
    )
    trainer.fit(Scripted(script))
    return trainer.update, knows.rates


FALLS = [5.0, 4.0, 4.5, 4.25, 4.1, 3.0, 2.0]


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize(
    ("stopping", "script", "stops_at"),
    [
        ({"patience": 2}, FALLS, 4),
        ({"patience": 3}, FALLS, 5),
        ({"patience": 4}, FALLS, 7),
        ({"patience": 2, "min_delta": 0.6}, [5.0, 4.5, 4.3, 3.0], 4),
        ({"patience": 2, "min_delta": 0.6}, [5.0, 4.5, 4.5, 3.0], 3),
        ({"patience": 2, "mode": "max", "min_delta": 0.1}, [1.0, 1.05, 1.2, 1.1, 1.25, 1.5], 5),
        ({"patience": 2}, [5.0, math.nan, math.nan, 1.0], 3),
    ],
)
def test_early_stopping(P: int, stopping: dict[str, Any], script: list[float], stops_at: int) -> None:
    for update, _ in run(P, fit_scripted, EarlyStopping(**stopping), script):
        assert update == stops_at


def test_early_stopping_is_remembered(tmp_path: Path) -> None:
    options = {"run_dir": str(tmp_path / "run")}
    for length, patience, expected in ((3, 2, 3), (7, 2, 4), (7, 2, 4), (7, 3, 5)):
        update, _ = fit_scripted(EarlyStopping(patience=patience), FALLS, **options, **{"max_updates": length})
        assert update == expected


def test_a_plateau_lowers_the_learning_rate_on_all_processes() -> None:
    script = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0]
    found = run(2, fit_scripted, PlateauLR(patience=1, factor=0.5), script)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    reference, expected = ReduceLROnPlateau(optimizer, factor=0.5, patience=1), []
    for value in script:
        expected.append(optimizer.param_groups[0]["lr"])
        reference.step(value)
    assert len(set(expected)) == 2
    assert [rates for _, rates in found] == [expected, expected]


def falls_by_epoch(optimizer: Any) -> Any:
    """Moves the rate when it is made, too."""
    return LambdaLR(optimizer, lambda epoch: 1 / (2 + epoch))


def fit_everything(folder: str, dies_at: int = 0, callbacks: Any = None, signals_at: int = 0) -> Any:
    """A run with every callback that has a state, killed after an update, or interrupted in a validation."""

    class Dies(Knows):
        def on_update_end(self, trainer: Trainer) -> None:
            super().on_update_end(trainer)
            if trainer.update == dies_at:
                assert trainer._checkpointer.newest  # waits until the save before is written
                os.kill(os.getpid(), signal.SIGKILL)

    class Validated(Regression):
        validation_data = Scripted.validation_data

        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            if self.trainer.update == signals_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}

    ema = EMA(0.9)
    trainer = Trainer(
        micro_batch_size=3,
        max_epochs=5,
        validate_every_n_updates=2,
        save_every_n_updates=2,
        callbacks=[Dies(), ema, EarlyStopping(patience=99), *(callbacks or [EpochLR(falls_by_epoch)])],
        run_dir=folder,
    )
    trainer.fit(Validated(13))
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    history = [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]
    state = trainer.strategy.state_dict(trainer.optimizer)
    return trainer.interrupted_by, history, state, ema.averages, [c.state_dict() for c in trainer.callbacks]


@pytest.mark.parametrize(("P", "plateau"), [(2, False), (1, True)])
def test_a_resume_does_not_show(P: int, plateau: bool, tmp_path: Path) -> None:
    callbacks = [PlateauLR(patience=1, factor=0.5, threshold=0.1)] if plateau else None
    expected = run(P, fit_everything, str(tmp_path / "whole"), 0, callbacks)
    for dies_at in (3, 9):  # the second within an epoch
        with pytest.raises(ChildError):
            run(P, fit_everything, str(tmp_path / "parts"), dies_at, callbacks)
    for found, reference in zip(run(P, fit_everything, str(tmp_path / "parts"), 0, callbacks), expected, strict=True):
        assert same(found, reference)
    rates = {record["epoch"]: record["lr"] for record in expected[0][1] if "lr" in record}
    assert len(set(rates.values())) > 1
    if not plateau:
        assert rates == {epoch: 0.1 * (1 / (2 + epoch)) for epoch in range(5)}


def test_an_interrupted_validation_leaves_the_parameters_and_not_their_average(tmp_path: Path) -> None:
    expected = fit_everything(str(tmp_path / "whole"))
    assert fit_everything(str(tmp_path / "parts"), signals_at=4)[0] == "SIGTERM"
    assert same(fit_everything(str(tmp_path / "parts")), expected)


class Trajectory(Callback):
    def __init__(self) -> None:
        self.parameters: list[Any] = []
        self.validated: list[Any] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self.parameters.append(parameters(trainer.model))

    def on_update_end(self, trainer: Trainer) -> None:
        self.parameters.append(parameters(trainer.model))

    def on_validation_end(self, trainer: Trainer) -> None:
        self.validated.append((trainer.update, trainer.metrics["first"]))


class FirstParameter(Regression):
    validation_data = Scripted.validation_data

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"first": parameters(model)[0]}


def fit_ema(run_dir: str | None = None, decay: float | None = 0.75, shards: bool = False) -> Any:
    trajectory, ema = Trajectory(), EMA(decay or 0.5)
    callbacks = [trajectory, ema] if decay else [trajectory]
    settings: dict[str, Any] = {"micro_batch_size": 4, "max_epochs": 3, "validate_every_n_updates": 2}
    strategy = DDPStrategy(shard_optimizer=True) if shards else "auto"
    trainer = Trainer(strategy, callbacks=callbacks, run_dir=run_dir, **settings)
    trainer.fit(FirstParameter(13))
    found = torch.cat([average.flatten() for average in ema.averages.values()]) if decay else None
    return trajectory.parameters, trajectory.validated, found, trainer.validate(trainer.task)["first"]


@pytest.mark.parametrize(("P", "shards"), [(1, False), (2, False), (2, True)])
def test_an_average_is_that_of_its_definition_and_is_what_is_validated(P: int, shards: bool, tmp_path: Path) -> None:
    without = run(P, fit_ema, None, None)[0][0]
    for path, validated, found, after in run(P, fit_ema, str(tmp_path / "run"), 0.75, shards):
        assert all(map(torch.equal, path, without))  # training does not know
        average, averages = path[0], {}
        for update, values in enumerate(path[1:], 1):
            average = averages[update] = 0.75 * average + 0.25 * values
        torch.testing.assert_close(found, average, rtol=0, atol=1e-14)
        assert validated == [(u, pytest.approx(averages[u][0].item(), abs=1e-14)) for u, _ in validated]
        assert [u for u, _ in validated] == list(range(2, len(averages) + 1, 2))
        assert after == pytest.approx(average[0].item(), abs=1e-14)
        written = load_file(tmp_path / "run" / "model-ema.safetensors")
        flat = torch.cat([written[name].flatten() for name in FirstParameter(1).model().state_dict()])
        torch.testing.assert_close(flat, average, rtol=0, atol=1e-14)


def test_an_average_of_a_narrow_model_moves_by_less_than_its_parameters_can() -> None:
    start, ema = torch.full((1, 5), 1.0), EMA(0.999)

    class Narrow(Regression):
        def configure_model(self) -> nn.Module:
            model = nn.Linear(5, 1, bias=False, dtype=torch.bfloat16)
            nn.init.ones_(model.weight)
            return model

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            mean: torch.Tensor = model(batch[0].bfloat16()).float().square().mean()
            return mean

    trajectory = Trajectory()
    trainer = Trainer(micro_batch_size=4, max_epochs=3, callbacks=[trajectory, ema], validate_every_n_updates=2)
    trainer.fit(Narrow(13))
    for values in trajectory.parameters[1:]:
        start = 0.999 * start + 0.001 * values.float()
    torch.testing.assert_close(ema.averages["weight"], start, rtol=0, atol=1e-6)
    assert trainer.model.weight.dtype is torch.bfloat16


def spans(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if event["name"].startswith("update ")})


def test_a_trace_has_the_updates_that_were_asked_for(tmp_path: Path) -> None:
    def fit(profiler: Profiler, folder: str, updates: int) -> None:
        trainer = Trainer(micro_batch_size=4, max_updates=updates, callbacks=profiler, run_dir=folder)
        trainer.fit(Regression(13))

    for (first, last, updates), expected in {
        (2, 3, 5): ["update 2", "update 3"],
        (1, 1, 3): ["update 1"],
        (3, 9, 4): ["update 3", "update 4"],
    }.items():
        folder = tmp_path / str(first)
        fit(Profiler(first, last), str(folder), updates)
        assert spans(folder / f"trace-{first}-{last}.json") == expected


class Told(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []


for event in ("fit_start", "epoch_start", "update_end", "validation_end", "epoch_end", "fit_end"):
    setattr(Told, f"on_{event}", lambda self, trainer, event=event: self.events.append(f"{event} {trainer.update}"))


def test_the_order_of_hooks() -> None:
    told = Told()
    trainer = Trainer(micro_batch_size=2, max_epochs=2, validate_every_n_updates=1, callbacks=[Knows(), told])
    trainer.fit(Scripted([1.0] * 4, samples=4))
    epochs = [
        [f"epoch_start {n}"]
        + [f"{event} {update}" for update in (n + 1, n + 2) for event in ("update_end", "validation_end")]
        + [f"epoch_end {n + 2}"]
        for n in (0, 2)
    ]
    assert told.events == ["fit_start 0", *epochs[0], *epochs[1], "fit_end 4"]


class WithScheduler(Scripted):
    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (lambda: EarlyStopping(patience=0), None, "patience=0"),
        (lambda: EarlyStopping(mode="low"), None, "expected min:METRIC or max:METRIC"),
        (lambda: EarlyStopping("accuracy"), Scripted([1.0]), "EarlyStopping=min:accuracy: evaluate.. returns loss"),
        (lambda: EarlyStopping(), Regression(4), "EarlyStopping: expected validation data, but Regression.validation_"),
        (lambda: PlateauLR(), Regression(4), "PlateauLR: expected validation data"),
        (lambda: PlateauLR(factor=2.0), None, "factor=2.0"),
        (lambda: EpochLR(falls_by_epoch), WithScheduler([1.0]), "EpochLR and the task's StepLR both set"),
        (lambda: EMA(decay=1.0), None, "decay=1.0"),
        (lambda: Profiler(3, 2), None, "first=3, last=2"),
        (lambda: Profiler(), Regression(4), "give a run_dir"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, task: Any, message: str) -> None:
    def attempt() -> None:
        callback = make()
        Trainer(micro_batch_size=4, max_updates=1, callbacks=[Knows(), callback]).fit(task)

    with pytest.raises(ValueError, match=message):
        attempt()
