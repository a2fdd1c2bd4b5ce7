"""P x K in {1x4, 2x2, 4x1} train the same model on the same samples, with dropout and augmentation."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from engine import Callback, GradientAccumulationScheduler, Loss, Trainer
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, Samples, Watch, big_batch_run, mlp, parameters

LAYOUTS = [(1, 4), (2, 2), (4, 1)]
SAMPLES, N, EPOCHS = 45, 3, 3


def fit(task: Any, K: int, **options: Any) -> tuple[torch.Tensor, list[list[int]], list[float]]:
    watch = Watch()
    trainer = Trainer(
        "ddp", micro_batch_size=N, accumulate_grad_batches=K, max_epochs=EPOCHS, callbacks=watch, **options
    )
    trainer.fit(task)
    return parameters(trainer.model), watch.samples, [r["loss"] for r in watch.records]


def test_every_layout_sees_the_same_samples_at_every_update_and_ends_alike() -> None:
    outcomes = {}
    for P, K in LAYOUTS:
        results = run(P, fit, Regression(SAMPLES), K)
        updates = [sorted(sum(shares, [])) for shares in zip(*(samples for _, samples, _ in results), strict=True)]
        outcomes[P] = (results[0][0], updates, results[0][2])
        for found, _, _ in results:
            assert torch.equal(found, results[0][0])  # replicas are equal to the bit
    reference, updates, losses = outcomes[1]
    an_epoch = len(updates) // EPOCHS
    for epoch in range(EPOCHS):
        assert sorted(sum(updates[epoch * an_epoch : (epoch + 1) * an_epoch], [])) == list(range(SAMPLES))
    assert updates[:an_epoch] != updates[an_epoch : 2 * an_epoch]  # it was shuffled, anew
    for P in (2, 4):
        assert outcomes[P][1] == updates
        torch.testing.assert_close(outcomes[P][0], reference, rtol=0, atol=1e-12)
        torch.testing.assert_close(outcomes[P][2], losses, rtol=1e-12, atol=0)
    windows = [updates[e * an_epoch : (e + 1) * an_epoch] for e in range(EPOCHS)]
    torch.testing.assert_close(big_batch_run(Regression(SAMPLES), windows), reference, rtol=0, atol=1e-12)


class Noisy(Samples):
    """Augments with each of the three generators that people use."""

    def __getitem__(self, index: int) -> Any:
        x, y, index = super().__getitem__(index)
        noise = torch.rand(()) + random.random() + float(numpy.random.rand())
        return x + 0.1 * noise, y, index


class NoisyPieces(Noisy):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        shift = random.random()
        return [(x + shift, y, index) for x, y, index in (self[i] for i in indices)]


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).double()


class Gated(nn.Module):
    """Draws without a module that is called anything like Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * torch.bernoulli(torch.full_like(x, 0.5)))


class Augmented(Regression):
    data_class: Any = Noisy

    def train_data(self) -> Any:
        return self.data_class(self.x, self.y)


def fit_augmented(K: int, data_class: Any, model: Any, workers: int) -> Any:
    task = Augmented(SAMPLES, model=model)
    task.data_class = data_class
    return fit(task, K, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data_class", [Noisy, pytest.param(NoisyPieces, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [dropout_mlp, Gated])
def test_dropout_and_augmentation_do_not_know_P(model: Any, data_class: Any, workers: int) -> None:
    found = {P: run(P, fit_augmented, K, data_class, model, workers)[0] for P, K in LAYOUTS}
    for P in (2, 4):
        torch.testing.assert_close(found[P][0], found[1][0], rtol=0, atol=1e-12)
    assert len(set(found[1][2])) == len(found[1][2])


class Draws(Regression):
    """Keeps what was drawn for each sample, in fetching and in forward; the order is the same in all epochs."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples, model=Gated)
        self.drawn: list[float] = []

    def train_data(self) -> Any:
        return Noisy(torch.zeros(len(self.x), 5, dtype=torch.float64), self.y)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x = batch[0]
        self.drawn += [*x[:, 0].tolist(), torch.rand(()).item()]
        return super().loss(model, batch)


def test_every_sample_and_micro_batch_of_every_epoch_draws_anew() -> None:
    task = Draws(12)
    Trainer("single", micro_batch_size=3, max_epochs=3, shuffle=False).fit(task)
    assert len(task.drawn) == 3 * (12 + 4)
    assert len(set(task.drawn)) == len(task.drawn)


def test_workers_change_nothing() -> None:
    with_workers, without = (run(1, fit_augmented, 4, Noisy, dropout_mlp, workers)[0] for workers in (2, 0))
    assert torch.equal(with_workers[0], without[0])


def test_fetching_leaves_the_host_s_generators_alone() -> None:
    def state() -> list[Any]:
        return [random.random(), float(numpy.random.rand())]

    from engine.data.fetch import Fetch

    random.seed(1), numpy.random.seed(1)
    expected = state()
    random.seed(1), numpy.random.seed(1)
    task = Regression(8)
    Fetch(Noisy(task.x, task.y), 0, list).__getitems__((0, 0, [1, 2, 3]))
    assert state() == expected


class DrawsAfterUpdates(Callback):
    """Draws from each generator where user code runs between updates."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def _draw(self, context: Any) -> None:
        self.drawn += [torch.rand(()).item(), random.random(), float(numpy.random.rand())]

    on_gradients = on_update_end = on_epoch_end = on_validation_end = _draw


class ValidatesByDraws(Regression):
    def validation_data(self) -> Any:
        return Noisy(self.x[:20], self.y[:20])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"drawn": Loss(torch.rand((), dtype=torch.float64) + batch[0].sum(), 1.0)}


def fit_with_draws(K: int, workers: int) -> Any:
    callback = DrawsAfterUpdates()
    options: dict[str, Any] = {"num_workers": workers, "max_epochs": 2, "validate_every_n_epochs": 1}
    trainer = Trainer("ddp", N, accumulate_grad_batches=K, callbacks=callback, **options)
    trainer.fit(ValidatesByDraws(SAMPLES))
    return callback.drawn, trainer.metrics["drawn"]


def test_draws_of_callbacks_do_not_know_workers_nor_those_of_validation_P() -> None:
    (drawn, metric), (drawn_with_workers, metric_with_workers) = (run(1, fit_with_draws, 4, w)[0] for w in (0, 2))
    assert drawn == drawn_with_workers
    assert metric == metric_with_workers
    for _, other in run(2, fit_with_draws, 2, 0):
        assert other == pytest.approx(metric, rel=1e-12)


@pytest.mark.parametrize(("unit", "scheduling"), [("update", {0: 1, 4: 2, 9: 5}), ("sample", {0: 4, 50: 1, 100: 2})])
def test_windows_scheduled_by_update_and_by_sample(unit: str, scheduling: dict[int, int]) -> None:
    @on_processes(2)
    def results() -> Any:
        watch = Watch()
        callbacks = [GradientAccumulationScheduler(scheduling, unit=unit), watch]  # type: ignore[arg-type]
        trainer = Trainer("ddp", micro_batch_size=N, max_epochs=EPOCHS, callbacks=callbacks)
        trainer.fit(Regression(SAMPLES))
        assert trainer.total_updates == trainer.update
        return [r["accumulate_grad_batches"] for r in watch.records], [r["samples"] for r in watch.records]

    Ks, samples = results[0]
    starts = list(range(len(Ks))) if unit == "update" else [0, *samples[:-1]]
    assert Ks == [scheduling[max(f for f in scheduling if f <= start)] for start in starts]
