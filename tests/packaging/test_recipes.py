"""The recipes beyond the default one."""

from __future__ import annotations

from typing import Any

import pytest

from engine import Trainer
from launch.recipes.stdlib_lm import StdlibLM
from launch.recipes.stdlib_lm.baseline import nats_per_byte
from launch.recipes.stdlib_lm.functions import train_and_held_out
from tests.kit.processes import run
from tests.kit.reference import Watch, parameters

LONG = (pytest.mark.slow, pytest.mark.campaign)


def fit(K: int, batches: Any) -> Any:
    task = StdlibLM(width=16, layers=1, heads=2, max_bytes=64, functions=120, batches=batches, budget=512, lr=0.01)
    configure = task.configure_model
    task.configure_model = lambda: configure().double()  # type: ignore[method-assign]
    N, watch = 1 if batches == "budget" else 6, Watch()
    trainer = Trainer("ddp", micro_batch_size=N, accumulate_grad_batches=K, max_epochs=2, callbacks=watch)
    trainer.fit(task)
    return parameters(trainer.model), trainer.metrics["nats_per_byte"], [r["loss"] for r in watch.records]


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param("shuffled", marks=LONG),
        pytest.param("bucketed", marks=pytest.mark.slow),
        pytest.param("budget", marks=LONG),
    ],
)
def test_stdlib_lm_trains_alike_on_one_and_two_processes(batches: str) -> None:
    train_and_held_out()  # read once: the processes inherit it
    (one, nats, losses), (two, nats_of_two, losses_of_two) = run(1, fit, 4, batches)[0], run(2, fit, 2, batches)[0]
    assert losses_of_two == pytest.approx(losses, abs=1e-7)  # AdamW enlarges rounding where a true gradient is zero
    assert nats_of_two == pytest.approx(nats, abs=1e-7)
    assert losses[-1] < losses[0]
    assert abs(two - one).max() < 1e-6


@pytest.mark.slow
def test_held_out_functions_are_not_trained_on() -> None:
    train, held_out = train_and_held_out(500)
    assert len(held_out) == 50
    assert not set(train) & set(held_out)


@pytest.mark.slow
def test_counting_gets_better_with_context() -> None:
    splits = train_and_held_out(1500)
    found = [nats_per_byte(order, *splits) for order in (0, 1)]
    assert 3.5 > found[0] > found[1] > 2
