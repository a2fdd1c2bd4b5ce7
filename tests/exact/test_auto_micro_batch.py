"""`micro_batch_size="auto"`: the fastest N that fits is found, and the run is to the bit the run with that N given."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, GradientAccumulationScheduler, Task, Trainer
from engine.callbacks import NoiseScale
from engine.cli.main import main
from engine.errors import UserError
from strategies import DDPStrategy
from tests.kit.hungry import DP, Single, TooLarge, fit
from tests.kit.killed import same
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, Samples
from tests.kit.streams import Streamed

B, SAMPLES, MOST = 24, 50, 5


class Noisy(TooLarge):
    """Draws of all kinds, buffers, momentum: whatever a search may leave behind."""

    def __init__(self) -> None:
        super().__init__(SAMPLES, MOST, model=lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 1)))
        self.x, self.y = self.x.float(), self.y.float()

    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train_data(self) -> Any:
        return Samples(self.x, self.y)

    def validation_data(self) -> Any:
        return Samples(self.x[:9], self.y[:9])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}


class State(Callback):
    """Keeps the state at the end."""

    def on_fit_end(self, trainer: Any) -> None:
        state = trainer.strategy.state_dict(trainer.optimizer)
        self.state = [state, trainer.lr_scheduler.state_dict(), trainer.metrics, trainer.samples, trainer.update]


def found(strategy: Any, N: Any, folder: str | None = None, updates: int | None = None) -> Any:
    state = State()
    trainer = Trainer(
        strategy(), N, effective_batch_size=B, max_epochs=2, max_updates=updates, callbacks=state, run_dir=folder
    )
    trainer.fit(Noisy())
    return state.state, [(trial.N, trial.samples_per_second > 0) for trial in trainer.tried], trainer.micro_batch_size


@pytest.mark.parametrize(("P", "strategy"), [(1, Single), (1, DP), (2, DDPStrategy)])
def test_nothing_of_the_search_stays(P: int, strategy: Any, tmp_path: Path) -> None:
    results = run(P, found, strategy, "auto", str(tmp_path / "auto"))
    N = results[0][2]
    given = run(P, found, strategy, N, str(tmp_path / "given"))
    for (state, tried, _), (expected, none, _) in zip(results, given, strict=True):
        assert same(state, expected)
        assert tried == [(1, True), (2, True), (4, True), (8, False), (6, False), (5, True)]
        assert none == []
        assert N in (1, 2, 4, 5)


def test_a_resume_does_not_search(tmp_path: Path) -> None:
    _, tried, N = run(2, found, DDPStrategy, "auto", str(tmp_path / "run"), 3)[0]
    rest, again, same_N = run(2, found, DDPStrategy, "auto", str(tmp_path / "run"))[0]
    whole, *_ = run(2, found, DDPStrategy, N)[0]
    assert tried
    assert again == []
    assert same_N == N
    assert same(rest, whole)


def test_what_was_tried_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.strategy=single", "--trainer.micro_batch_size=auto", "--trainer.effective_batch_size=24"]
    task = ["--task=tests.exact.test_auto_micro_batch.Small", "--trainer.max_epochs=1"]
    assert main([*task, *options, "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("tried:"))
    assert [line.removeprefix("tried:").split()[1] for line in lines[first : first + 6]] == list("124865")
    assert "did not fit" in lines[first + 3]
    assert lines[first + 2].endswith("samples/s")
    assert main([*task, *options, "--plan"]) == 2
    assert "a plan needs a number" in capsys.readouterr().err


def test_the_search_says_nothing_of_the_noise_scale(caplog: pytest.LogCaptureFixture) -> None:
    Trainer("single", "auto", effective_batch_size=8, max_epochs=2, callbacks=NoiseScale(1)).fit(Regression(16))
    assert sum("noise_scale" in record.getMessage() for record in caplog.records) <= 1  # of the run, if N is 8


class Interrupted(Regression):
    """Is told to end in its second window: in the search."""

    def loss(self, model: Any, batch: Any) -> Any:
        self.windows = getattr(self, "windows", 0) + 1
        if self.windows == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().loss(model, batch)


def test_a_search_that_is_interrupted_ends_before_the_first_update(tmp_path: Path) -> None:
    @on_processes(2)
    def results() -> Any:
        folder = str(tmp_path)
        trainer = Trainer("ddp", "auto", effective_batch_size=8, max_epochs=1, run_dir=folder)
        trainer.fit(Interrupted(16) if trainer.strategy.rank == 0 else Regression(16))
        first = trainer.interrupted_by, trainer.update, trainer.tried
        again = Trainer("ddp", "auto", effective_batch_size=8, max_epochs=1, run_dir=folder)
        again.fit(Regression(16))
        return *first, again.update, bool(again.tried)

    for (name, update, tried, updates, searched), expected in zip(
        results, ("SIGTERM", "a signal to another process"), strict=True
    ):
        assert name == expected
        assert (update, tried, updates, searched) == (0, [], 2, True)


class Small(TooLarge):
    def __init__(self) -> None:
        super().__init__(SAMPLES, MOST)


def auto(task: Task | None = None, B: int | None = 8, **settings: Any) -> None:
    Trainer(micro_batch_size="auto", effective_batch_size=B, max_epochs=1, **settings).fit(task or Regression(8))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"B": None}, "expected an effective_batch_size"),
        ({"B": None, "callbacks": GradientAccumulationScheduler({0: 2})}, "expected an effective_batch_size"),
        ({"strategy": "fsdp"}, "strategy 'fsdp' cannot run a window again"),
        ({"strategy": "pipeline"}, "cannot run a window again"),
        ({"task": Streamed(4, [[[0, 1], [2, 3]]])}, "needs map-style data"),
        ({"task": Regression(0)}, "has no samples"),
        ({"task": TooLarge(8, 0)}, "with one sample in each micro-batch: process 0: OutOfMemoryError"),
    ],
)
def test_bad_input(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        auto(**settings)


@pytest.mark.parametrize("N", ["Auto", 0, -1, True, 2.0])
def test_other_values(N: Any) -> None:
    with pytest.raises(UserError, match=r"micro_batch_size=.*expected a whole number"):
        Trainer(micro_batch_size=N, max_epochs=1)


def test_bad_input_on_two_processes() -> None:
    @on_processes(2)
    def different() -> str:
        rank = int(os.environ["RANK"])
        with pytest.raises(UserError) as caught:
            fit(Regression(SAMPLES), DDPStrategy(), "auto" if rank else 4, B)
        return str(caught.value)

    assert all("micro_batch_size is 4 on process 0, auto on process 1" in text for text in different)

    @on_processes(2)
    def too_few() -> str:
        with pytest.raises(UserError) as caught:
            fit(Regression(1), DDPStrategy(), "auto", B)
        return str(caught.value)

    assert all("expected at least 2 samples, one for each process" in text for text in too_few)
