"""Every strategy, P, K and tail gives the parameters of one big batch, within 1e-12."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import Accumulator, GradientAccumulationScheduler, Trainer
from strategies import DDPStrategy, DPStrategy, SingleDeviceStrategy
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, Watch, big_batch_run, in_order, parameters
from tests.kit.table import EPOCHS, TAILS, N, expected


def train(strategy: Any, samples: int, K: int, **options: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    watch = Watch()
    settings = {"micro_batch_size": N, "accumulate_grad_batches": K, "max_epochs": EPOCHS, "shuffle": False, **options}
    trainer = Trainer(strategy, callbacks=watch, **settings)
    trainer.fit(Regression(samples))
    return parameters(trainer.model), watch.records


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy(), DPStrategy(2, "cpu"), DPStrategy(3, "cpu")], ids=["single", "dp2", "dp3"]
)
def test_one_process_equals_one_big_batch(strategy: Any, K: int, tail: str) -> None:
    samples = TAILS[tail](N * K)
    found, records = train(strategy, samples, K)
    torch.testing.assert_close(found, expected(samples, N * K), rtol=0, atol=1e-12)
    assert [r["effective_batch"] for r in records[: len(records) // EPOCHS]] == [
        len(w) for w in in_order(samples, N * K)
    ]


@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_ddp_equals_one_big_batch(P: int, K: int) -> None:
    @on_processes(P)  # all tails in the same processes, which cost more than the training
    def results() -> Any:
        return {tail: train(DDPStrategy(), size(P * N * K), K) for tail, size in TAILS.items()}

    for found in results:
        for tail, size in TAILS.items():
            samples, (ended, records) = size(P * N * K), found[tail]
            torch.testing.assert_close(ended, expected(samples, P * N * K), rtol=0, atol=1e-12, msg=in_words(tail))
            assert records[-1]["samples"] == EPOCHS * samples


def in_words(case: object) -> Any:
    """Say in a failure of torch's which case it is of."""
    return lambda message: f"{case}: {message}"


@pytest.mark.parametrize(
    ("scheduling", "Ks"), [({0: 8, 4: 4, 8: 1}, [8] * 4 + [4] * 4 + [1] * 2), ({1: 4, 3: 2}, [1, 4, 4, 2])], ids=str
)
@pytest.mark.parametrize("P", [1, 2, 3])
def test_schedule_of_windows_equals_big_batches(P: int, scheduling: dict[int, int], Ks: list[int]) -> None:
    samples = 11 * N + 1  # a short last window in every epoch
    reference = big_batch_run(Regression(samples), [in_order(samples, P * N * K) for K in Ks])

    @on_processes(P)
    def results() -> Any:
        trainer = Trainer(
            "ddp",
            micro_batch_size=N,
            max_epochs=len(Ks),
            shuffle=False,
            callbacks=[GradientAccumulationScheduler(scheduling), watch := Watch()],
        )
        trainer.fit(Regression(samples))
        assert trainer.total_updates == trainer.update == len(watch.records)
        return parameters(trainer.model), watch.records

    for found, records in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        for epoch, K in enumerate(Ks):
            used = [r["accumulate_grad_batches"] for r in records if r["epoch"] == epoch]
            assert used == [K] * -(-samples // (P * N * K))


@pytest.mark.parametrize("P", [1, 3])
def test_clipping_acts_on_the_whole_gradient_of_an_update(P: int) -> None:
    samples, max_norm = 5 * N + 3, 0.05
    reference = big_batch_run(Regression(samples), [in_order(samples, P * N * 2)] * EPOCHS, max_norm=max_norm)
    for found, records in run(P, lambda: train("ddp", samples, 2, gradient_clip_norm=max_norm)):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert records[0]["grad_norm"] > max_norm  # it did clip


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_any_effective_batch_on_any_number_of_processes(P: int) -> None:
    samples, batches = 43, (1, 7, 12, 30)
    for found in run(P, lambda: [train("ddp", samples, 1, effective_batch_size=B) for B in batches]):
        for B, (ended, records) in zip(batches, found, strict=True):
            torch.testing.assert_close(ended, expected(samples, B), rtol=0, atol=1e-12, msg=in_words(B))
            assert {r["accumulate_grad_batches"] for r in records} == {-(-B // (P * N))}


@pytest.mark.parametrize("P", [1, 3, 4])
def test_windows_spread_evenly_equal_one_big_batch(P: int) -> None:
    sizes = (29, 49, 50)
    for found in run(P, lambda: [train("ddp", samples, 2, spread_windows=True) for samples in sizes]):
        for samples, (ended, records) in zip(sizes, found, strict=True):
            reference = expected(samples, P * N * 2)
            torch.testing.assert_close(ended, reference, rtol=0, atol=1e-12, msg=in_words(samples))
            assert records[-1]["samples"] == EPOCHS * samples


@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("K", [1, 3])
def test_a_loop_of_one_s_own_equals_one_big_batch(P: int, K: int) -> None:
    samples = 2 * P * N * K + 1
    windows = [in_order(samples, P * N * K), in_order(samples, P * N * (K + 1))]

    @on_processes(P)
    def results() -> Any:
        task = Regression(samples)
        strategy = DDPStrategy()
        strategy.setup()
        torch.manual_seed(0)
        model = strategy.prepare(task.configure_model())
        optimizer = task.configure_optimizer(model)
        accumulator = Accumulator(strategy, model, optimizer, task.train_data(), N, {0: K, 1: K + 1}, shuffle=False)
        samples_seen = []
        for epoch in range(2):
            for window in accumulator.windows(epoch):
                for batch in window:
                    window.backward(task.loss(model, batch))
                samples_seen.append(window.update().samples)
        return parameters(model), samples_seen

    for found, seen in results:
        torch.testing.assert_close(found, big_batch_run(Regression(samples), windows), rtol=0, atol=1e-12)
        assert seen == [len(w) for epoch in windows for w in epoch]
