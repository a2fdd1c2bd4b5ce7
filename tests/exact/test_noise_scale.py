"""The gradient noise scale: its parts are those of float64 by hand on every layout, and its estimate has no bias."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import Accumulator, Callback, Loss, Trainer
from engine.callbacks import NoiseScale
from engine.update.noise_scale import FIELDS, moments, ratio
from strategies import DDPStrategy, DPStrategy, PipelineStrategy, resolve
from tests.kit.processes import run
from tests.kit.recorders import Count
from tests.kit.reference import Regression
from tests.kit.streams import Streamed, deal
from tests.kit.tokens import Sequences
from tests.kit.windows import Clip

SAMPLES, N, EPOCHS = 37, 2, 2


class Still(Regression):
    """It moves nothing, so that each update has the gradients of the first parameters."""

    def __init__(self) -> None:
        super().__init__(SAMPLES, lr=0.0)

    def gradient(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, float]:
        return flat(model, nn.functional.mse_loss(model(self.x[rows]), self.y[rows], reduction="sum")), len(rows)


class StillTokens(Sequences):
    """Weights are known late, and are on the device."""

    def __init__(self) -> None:
        super().__init__(SAMPLES, masked=range(4, 8))
        self.seen: list[list[int]] = []

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.0)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(self.tokens, self.valid, torch.arange(SAMPLES))

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.seen.append(batch[2].tolist())
        return super().loss(model, batch[:2])

    def gradient(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, float]:
        losses = self.token_losses(model, self.tokens[rows]) * self.valid[rows]
        return flat(model, losses.sum()), self.valid[rows].sum().item()


class StillStream(Streamed):
    def __init__(self) -> None:
        super().__init__(SAMPLES, deal([5, 1, 0], [3, 1, 2, 4]), lr=0.0)

    gradient = Still.gradient


def flat(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


class Micros(Callback):
    """Keeps each update's record, and this process's micro-batches."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.windows: list[list[list[int]]] = []

    def on_update_end(self, trainer: Any) -> None:
        self.records.append(dict(trainer.record))
        self.windows.append(trainer.task.seen[:])
        trainer.task.seen.clear()


def by_hand(task: Any, processes: list[list[list[list[int]]]], every: int) -> list[list[float]]:
    """The reference: after each update, the noise scale and its interval, from the equations and a jackknife's loop."""
    torch.manual_seed(0)
    model, pairs, estimates = task.configure_model(), [], []
    for update, windows in enumerate(zip(*processes, strict=True)):
        Q = V = V2 = W = 0.0
        whole: Any = 0.0
        for micros in windows:
            gradients = [task.gradient(model, rows) for rows in micros]
            whole += sum(g for g, _ in gradients)
            W += sum(w for _, w in gradients)
            u, w = sum(g for g, _ in gradients[:-1]), sum(w for _, w in gradients[:-1])
            Q, V, V2 = Q + float((u**2).sum() if len(micros) > 1 else 0.0), V + w, V2 + w**2
        if update % every == 0 and V2 < W * V * (1 - 1e-9):  # not where the last micro-batches have no weight
            T = float((whole**2).sum())
            signal, noise = np.linalg.solve([[V2, V], [W**2, W]], [Q, T])
            pairs.append((W * noise, W * signal))
        estimates.append(jackknife(pairs))
    return estimates


def jackknife(pairs: list[tuple[float, float]]) -> list[float]:
    def spread(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    def tangent(angle: float) -> float:
        return 0.0 if angle <= 0 else math.inf if angle >= math.pi / 2 else math.tan(angle)

    if not pairs:
        return [math.nan] * 3
    n, noise, signal = len(pairs), sum(noise for noise, _ in pairs), sum(signal for _, signal in pairs)
    value = 0.0 if noise <= 0 else math.inf if signal <= 0 else noise / signal
    if n == 1:
        return [value, math.nan, math.nan]
    scale = spread([noise for noise, _ in pairs]) / spread([signal for _, signal in pairs])
    without = [math.atan2(noise - own_noise, (signal - own_signal) * scale) for own_noise, own_signal in pairs]
    angle, margin = math.atan2(noise, signal * scale), 1.96 * math.sqrt(n - 1) * spread(without)
    return [value, scale * tangent(angle - margin), scale * tangent(angle + margin)]


class Approximate(DDPStrategy):
    """As with PowerSGD, what a window gives is not the sum of its gradients."""

    exact_to = None


def strategy_of(name: str, K: int) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "dp": lambda: DPStrategy(2, "cpu"),
        "buckets": lambda: DDPStrategy(gradient_as_bucket_view=True),
        "unused": lambda: DDPStrategy(find_unused_parameters=True),
        "approximate": Approximate,
        "pipeline": lambda: PipelineStrategy(micro_batches=K),
    }
    return made[name]() if name in made else name


def fit(name: str, K: int, make: Callable[[], Any], every: int = 1, **options: Any) -> Any:
    watch, task = Micros(), make()
    callbacks = [watch, NoiseScale(every)]
    Trainer(strategy_of(name, K), N, K, max_epochs=EPOCHS, callbacks=callbacks, **options).fit(task)
    return watch.records, watch.windows


def compare(results: Any, task: Any, every: int = 1) -> None:
    expected = by_hand(task, [windows for _, windows in results], every)
    assert any(math.isfinite(value) for value, _, _ in expected)
    for records, _ in results:
        found = [[record[name] for name in FIELDS] for record in records]
        for estimate, reference in zip(found, expected, strict=True):
            assert estimate == pytest.approx(reference, rel=1e-12, nan_ok=True)


LAYOUTS = [("single", 1, 4), ("dp", 1, 4), ("ddp", 1, 3), ("ddp", 2, 2), ("ddp", 3, 3), ("ddp", 4, 2)]
EVERYDAY = [("single", 1, 4, Still), ("dp", 1, 4, Still), ("ddp", 2, 3, StillTokens), ("ddp", 3, 2, Still)]
OTHERS = [
    (*layout, make) for layout in [*LAYOUTS, ("buckets", 2, 3), ("unused", 2, 3)] for make in (Still, StillTokens)
]


@pytest.mark.parametrize(
    ("name", "P", "K", "make"),
    [*EVERYDAY, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in EVERYDAY)],
)
def test_it_is_that_of_the_equations(name: str, P: int, K: int, make: Any) -> None:
    compare(run(P, fit, name, K, make), make())


def test_clipping_comes_after_it_and_every_second_update_may_be_measured() -> None:
    compare(run(2, lambda: fit("ddp", 3, Still, 2, gradient_clip_norm=1e-3)), Still(), 2)


def test_of_uneven_streams() -> None:
    compare(run(3, fit, "ddp", 3, StillStream), StillStream())


def own_loop(resumes_at: int | None) -> Any:
    task, strategy = Still(), resolve("auto")
    strategy.setup()
    torch.manual_seed(0)
    model = strategy.prepare(task.configure_model())
    optimizer, data, seen, metrics = task.configure_optimizer(model), task.train_data(), [], []

    def accumulator() -> Accumulator:
        return Accumulator(strategy, model, optimizer, data, N, 3, noise_scale_every_n_updates=1)

    loop = accumulator()
    for epoch in range(EPOCHS):
        for window in loop.windows(epoch):
            for batch in window:
                window.backward(task.loss(model, batch))
            metrics.append(dict(window.update().metrics))
            seen.append(task.seen[:])
            task.seen.clear()
            if loop.update == resumes_at:
                break
        if loop.update == resumes_at:
            state, loop = loop.state_dict(), accumulator()
            loop.load_state_dict(state)
            loop.load_state_dict(state)  # in place of what was loaded, not beside it
            for window in loop.windows(epoch):
                for batch in window:
                    window.backward(task.loss(model, batch))
                metrics.append(dict(window.update().metrics))
    return metrics, seen


@pytest.mark.parametrize("P", [1, 2])
def test_own_loops_have_it_and_resume_with_it(P: int) -> None:
    results = run(P, own_loop, None)
    compare(results, Still())
    for (metrics, _), (again, _) in zip(results, run(P, own_loop, 2), strict=True):
        assert repr(again) == repr(metrics[: len(again)])
        assert len(again) > 2


def fit_in_parts(folder: str, updates: int, every: int = 1) -> Any:
    watch, noise = Micros(), NoiseScale(every)
    options: Any = {
        "run_dir": folder,
        "callbacks": [watch, noise],
        "max_updates": updates,
        "validate_every_n_epochs": None,
    }
    Trainer("auto", N, 3, **options).fit(Regression(SAMPLES))
    return [[record[name] for name in FIELDS] for record in watch.records], noise.state_dict()


@pytest.mark.parametrize("P", [1, 2])
def test_a_resumed_run_has_the_same_to_the_bit(P: int, tmp_path: Path) -> None:
    whole = run(P, fit_in_parts, str(tmp_path / "whole"), 11)
    parts = [run(P, fit_in_parts, str(tmp_path / "parts"), updates) for updates in (4, 11)]
    for (records, state), (first, _), (second, state_again) in zip(whole, *parts, strict=True):
        assert repr(first + second) == repr(records)
        assert state_again == state
    run(P, fit_in_parts, str(tmp_path / "parts"), 11)  # it is at its end: there is advice, and nothing to train


def test_a_loss_scale_comes_after_it() -> None:
    def fit_in(precision: str | None) -> Any:
        return [record["noise_scale"] for record in fit("single", 4, Float, precision=precision)[0]]

    assert fit_in("fp16") == pytest.approx(fit_in(None), rel=0.05)


class Float(Still):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = self.x.float(), self.y.float()

    def configure_model(self) -> nn.Module:
        return super().configure_model().float()


class Contrast(Clip):
    seen: list[list[int]] = []  # noqa: RUF012


@pytest.mark.parametrize(
    ("name", "P", "K", "make"),
    [
        ("single", 1, 1, Still),
        ("ddp", 2, 1, Still),
        ("approximate", 2, 3, Still),
        ("fsdp", 2, 3, Still),
        ("pipeline", 2, 3, Still),
        ("ddp", 2, 2, Contrast),
    ],
)
def test_where_it_is_unknown_is_said_once(name: str, P: int, K: int, make: Any) -> None:
    def fit_it() -> Any:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("tally").addHandler(handler)
        records, _ = fit(name, K, make)
        return said, [record[field] for record in records for field in FIELDS]

    for rank, (said, values) in enumerate(run(P, fit_it)):
        assert len(values) > 3
        assert all(math.isnan(value) for value in values)
        assert len(said) == (rank == 0)
        assert all("noise_scale is unknown: it takes K >= 2" in text for text in said)


def test_a_stage_of_K_1_has_none() -> None:
    from engine import GradientAccumulationScheduler

    watch = Micros()
    callbacks = [watch, NoiseScale(1), GradientAccumulationScheduler({0: 3, 1: 1})]
    Trainer("single", N, max_epochs=2, callbacks=callbacks).fit(Still())
    for record in watch.records:
        assert math.isnan(record["noise_scale"]) == (record["accumulate_grad_batches"] == 1)


DRAWS, DIMENSIONS = 10_000, 4
GRADIENT, NOISE = 1.5, 20.0  # |G|^2 and tr S


def draws(P: int, K: int, weights: str, generator: np.random.Generator, noise: float = NOISE) -> tuple[Any, ...]:
    """(Q, V, V2, T, W) of many updates: each micro-batch's sum is normal, of mean wG and covariance wS."""
    w = {
        "1": lambda: np.ones((DRAWS, P, K)),
        "1 to 39": lambda: generator.integers(1, 40, (DRAWS, P, K)).astype(float),
        "tokens": lambda: generator.integers(0, 512, (DRAWS, P, K, 2)).clip(0, 256).sum(-1).astype(float),
    }[weights]()
    w[:, 0, 0] += w.sum((1, 2)) == 0
    mean = np.sqrt(GRADIENT / DIMENSIONS)
    sums = w[..., None] * mean + np.sqrt(w * noise / DIMENSIONS)[..., None] * generator.standard_normal(
        (*w.shape, DIMENSIONS)
    )
    own, parts = w[:, :, :-1].sum(2), sums[:, :, :-1].sum(2)
    T, W = (sums.sum((1, 2)) ** 2).sum(-1), w.sum((1, 2))
    return (parts**2).sum((1, 2)), own.sum(1), (own**2).sum(1), T, W


@pytest.mark.parametrize("weights", ["1", "1 to 39", "tokens"])
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("P", [1, 2, 4])
def test_it_has_no_bias(P: int, K: int, weights: str) -> None:
    Q, V, V2, T, W = draws(P, K, weights, np.random.default_rng(10 * P + K))
    some = V > 0
    signal, noise = moments(*(values[some] for values in (Q, V, V2, T, W)))
    for values, truth in ((signal, GRADIENT), (noise, NOISE)):
        # each update counts by its weight, as in a run
        weighted = W[some] * (values - truth)
        assert abs(weighted.mean()) < 2 * weighted.std() / math.sqrt(len(weighted)) + 1e-12


@pytest.mark.parametrize("noise_scale", [0.3, 20.0, 100.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(noise_scale: float) -> None:
    """Windows have 160 of weight on average: far more than the noise scale, and as much."""
    Q, V, V2, T, W = draws(2, 4, "1 to 39", np.random.default_rng(3), noise_scale * GRADIENT)
    signal, noise = moments(Q, V, V2, T, W)
    inside, values = 0, []
    runs = np.stack([W * noise, W * signal], 1).reshape(-1, 50, 2)
    for pairs in runs:
        value, low, high = ratio(*pairs.T)
        values.append(value)
        inside += low <= noise_scale <= high
    assert 0.9 < inside / len(runs) < 0.985
    assert np.median(values) == pytest.approx(noise_scale, rel=0.2)


def test_without_noise_it_is_0_and_without_signal_it_has_no_upper_end() -> None:
    assert ratio([-0.1, 0.0, -0.2], [1.0, 2.0, 1.5])[:2] == (0.0, 0.0)
    value, low, high = ratio([1.0, 1.3, 1.1], [-0.5, 0.7, -0.3])
    assert (value, high) == (math.inf, math.inf)
    assert 0 < low < math.inf
    assert ratio([2.0] * 3, [1.0] * 3)[0] == pytest.approx(2.0)


def counts(every: int | None, K: int) -> Any:
    watch = Count()
    callbacks = [watch] if every is None else [watch, NoiseScale(every)]
    Trainer("ddp", N, K, max_epochs=EPOCHS, callbacks=callbacks, gradient_clip_norm=1.0).fit(Regression(SAMPLES))
    return watch.counts, watch.looks


def test_no_message_more() -> None:
    for (with_it, looks), (without, looks_without) in zip(run(2, counts, 2, 3), run(2, counts, None, 3), strict=True):
        assert with_it == without
        assert all(count["allgather_"] == 1 for count in with_it)
        assert {a - b for a, b in zip(looks, looks_without, strict=True)} <= {0}
