"""The cost of the reduction, by a clock that only the work moves, and the scaling model made from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine.update.timing
import engine.update.updater
from engine import Callback, GradientAccumulationScheduler, Trainer
from engine.update.timing import HIDDEN, ReductionCost
from strategies import DDPStrategy
from tests.benchmarks.scaling_model import Link, calibrated
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression

DATA, MICRO_BATCH, REDUCTION, STEP = 3.0, 10.0, 30.0, 5.0
SAMPLES, N = 42, 2


class Clock:
    now = 0.0
    reads = 0

    @classmethod
    def read(cls) -> float:
        cls.reads += 1
        return cls.now


class Reducing(DDPStrategy):
    def backward(self, loss: Tensor, scale: float | Tensor) -> None:
        super().backward(loss, scale)
        Clock.now += REDUCTION * self._ddp.require_backward_grad_sync


class Stepping(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        Clock.now += STEP
        return super().step(closure)


class Working(Regression):
    def configure_optimizer(self, model: nn.Module) -> Any:
        return Stepping(model.parameters(), lr=self.lr)

    def collate(self, samples: list[Any]) -> Any:
        Clock.now += DATA
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        Clock.now += MICRO_BATCH if self.seen else 10 * MICRO_BATCH  # the first one warms up
        return super().loss(model, batch)


def put_clock() -> None:
    engine.update.updater.time = engine.update.timing.time = SimpleNamespace(perf_counter=Clock.read)  # type: ignore[assignment]


def reduction(strategy: Any, Ks: list[int], folder: Path) -> Any:
    """Return what summary.json says of it, on process 0, which writes it; the last window of each epoch is short."""
    put_clock()
    scheduler = GradientAccumulationScheduler(dict(enumerate(Ks)))
    trainer = Trainer(strategy, N, callbacks=scheduler, max_epochs=len(Ks), run_dir=str(folder))
    trainer.fit(Working(SAMPLES))
    return json.loads((folder / "summary.json").read_text())["reduction"] if trainer.strategy.rank == 0 else None


@pytest.mark.parametrize(("Ks", "K"), [([2], 2), ([1, 2, 3, 1], 3)])
def test_the_share_of_an_update(Ks: list[int], K: int, tmp_path: Path) -> None:
    found = run(2, reduction, Reducing(), Ks, tmp_path / "run")[0]
    assert found["accumulate_grad_batches"] == K
    assert found["seconds_per_micro_batch"] == DATA + MICRO_BATCH
    assert found["seconds"] == REDUCTION
    assert found["seconds_of_step"] == STEP
    assert found["share_of_update"] == REDUCTION / (K * (DATA + MICRO_BATCH) + REDUCTION + STEP)


@pytest.mark.parametrize(("P", "strategy", "K"), [(1, "single", 2), (2, "ddp", 1)])
def test_it_is_not_known_without_other_processes_or_micro_batches(
    P: int, strategy: str, K: int, tmp_path: Path
) -> None:
    assert run(P, reduction, strategy, [K], tmp_path / "run")[0] is None


def spent(strategy: Any, K: int, windows: int, folder: Path) -> dict[str, float]:
    """Return what the save at the end of two epochs, with so many full windows each, says of one: on process 0."""
    put_clock()
    trainer = Trainer(strategy, N, accumulate_grad_batches=K, max_epochs=2, run_dir=str(folder))
    trainer.fit(Working(SAMPLES))
    if trainer.strategy.rank:
        return {}
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (found,) = (event["spent"] for event in told if event["event"] == "save")
    warming = 9 * MICRO_BATCH  # the first micro-batch
    return {what: (seconds - warming * ("forward" in what)) / (2 * windows) for what, seconds in found.items()}


@pytest.mark.parametrize(
    ("strategy", "K", "windows", "expected"),
    [
        ("single", 1, 21, {"waiting for data": DATA, "forward and backward": MICRO_BATCH}),
        ("single", 3, 7, {"waiting for data": 3 * DATA, "forward and backward": 3 * MICRO_BATCH}),
        (
            Reducing(),
            3,
            3,
            {
                "waiting for data": 3 * DATA,
                "forward and backward": 3 * MICRO_BATCH,
                "reduction, and waiting for others": REDUCTION,
            },
        ),
        (
            Reducing(),
            1,
            11,
            {
                "waiting for data": DATA,
                "forward and backward, reduction, and waiting for others": MICRO_BATCH + REDUCTION,
            },
        ),
    ],
)
def test_where_the_time_of_updates_goes(
    strategy: Any, K: int, windows: int, expected: dict[str, float], tmp_path: Path
) -> None:
    P = 2 if isinstance(strategy, Reducing) else 1
    assert run(P, spent, strategy, K, windows, tmp_path / "run")[0] == pytest.approx(
        {**expected, "optimizer's step": STEP}
    )


class Uneven(Working):
    fetched = 0

    def collate(self, samples: list[Any]) -> Any:
        Clock.now += DATA * (self.fetched % 3) ** 2
        self.fetched += 1
        return Regression.collate(self, samples)


def test_the_wait_that_is_seen_is_that_of_another_micro_batch_each_time(tmp_path: Path) -> None:
    @on_processes(1)
    def waits() -> float:
        folder = tmp_path / "run"
        put_clock()
        Trainer("single", N, accumulate_grad_batches=3, max_updates=84, run_dir=str(folder)).fit(Uneven(SAMPLES))
        told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        return sum(event["spent"]["waiting for data"] for event in told if event["event"] == "save")

    assert waits[0] == pytest.approx(84 * (0 + 1 + 4) * DATA, rel=0.05)


def reads_per_update(K: int) -> float:
    put_clock()
    Clock.reads = 0
    trainer = Trainer("ddp", N, accumulate_grad_batches=K, max_epochs=1, callbacks=Callback())
    trainer.fit(Working(48))
    return Clock.reads / trainer.update


def test_a_longer_window_does_not_look_at_the_clock_more_often() -> None:
    assert run(2, reads_per_update, 2) == run(2, reads_per_update, 6)


@pytest.mark.parametrize("reduction", [0.0, 0.1, 1.0, 7.0, 100.0])
def test_the_K_that_hides_it_is_the_least(reduction: float) -> None:
    costs = ReductionCost(4, 0.7, reduction, 0.2)
    K = next(K for K in range(1, 10_000) if costs.share(K) < HIDDEN)
    assert costs.hiding == K


def test_the_model_gives_back_the_run_it_was_calibrated_with() -> None:
    link, costs = Link(bandwidth=1000.0, latency=0.01), ReductionCost(4, 0.5, 1.25, 0.125)
    summary = {"processes": 2, "all_reduces_per_update": 3, "bytes_reduced_per_update": 2000}
    model = calibrated({**summary, "reduction": costs.summary()}, link)
    assert model.seconds(P=2, K=4) == pytest.approx(4 * 0.5 + 1.25 + 0.125)
    # by hand: of four processes each sends 2 x 3/4 of the bytes, in 6 messages for each of three collectives
    ring = {2: 2000 / 1000 + 2 * 0.01 * 3, 4: 1.5 * 2000 / 1000 + 6 * 0.01 * 3}
    overlap = ring[2] - 1.25
    assert model.seconds(P=4, K=2) == pytest.approx(2 * 0.5 + ring[4] - overlap + 0.125)
    assert model.seconds(P=1, K=2) == pytest.approx(2 * 0.5 + 0.125)
    with pytest.raises(ValueError, match="K >= 2"):
        calibrated({**summary, "reduction": None}, link)
