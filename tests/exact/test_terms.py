"""Terms, each divided by a weight of its own: the gradient is that of one batch, whatever K and P are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Accumulator
from strategies import DDPStrategy, FSDPStrategy
from tests.kit.processes import run
from tests.kit.reference import parameters
from tests.kit.terms import TERMS, Groups, GroupsTwice, N, check, cut, fit, reference

UNUSED = partial(DDPStrategy, find_unused_parameters=True)


def forms(window: int) -> dict[str, Any]:
    """Tasks for windows of `window` samples: the last window is two samples, so all but one process have no data."""
    samples, masked = 2 * window + 2, range(window)
    return {
        "three": Groups(samples),
        "two, numbers": numbers(Groups(samples, TERMS[:2])),
        "the first left out": Groups(samples, ("value", "policy"), masked, divides=True),
        "all left out": Groups(samples, TERMS[:2], masked, is_empty=True),
    }


def numbers(task: Groups) -> Groups:
    task.as_tensors = False
    return task


def check_forms(P: int, K: int, strategy: Any, tasks: dict[str, Any]) -> None:
    results = run(P, lambda: {name: fit(task, strategy, K, 0.5) for name, task in tasks.items()})
    for name, task in tasks.items():
        check([found[name] for found in results], reference(task, cut(len(task.x), P * N * K) * 2, clip=0.5))


@pytest.mark.parametrize("K", [1, 3, 4])
@pytest.mark.parametrize("P", [1, 2, 4])
def test_terms_counted_on_the_host(P: int, K: int) -> None:
    check_forms(P, K, DDPStrategy, forms(P * N * K))


@pytest.mark.parametrize(("P", "K"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_terms_whose_weights_the_forward_knows(P: int, K: int) -> None:
    tasks = forms(P * N * K)
    for task in tasks.values():
        task.__class__ = GroupsTwice
    check_forms(P, K, DDPStrategy, tasks)


@pytest.mark.parametrize("kind", [Groups, GroupsTwice])
def test_other_strategies(kind: Any) -> None:
    window = 2 * N * 2
    tasks = {"three": kind(2 * window + 2), "one left out": kind(2 * window + 2, TERMS, range(window))}
    check_forms(2, 2, FSDPStrategy, tasks)
    check_forms(2, 2, UNUSED, tasks)
    for name in ("single", "dp"):
        task = kind(14)
        check([fit(task, name, 2, 0.5)], reference(task, cut(14, N * 2) * 2, clip=0.5))


def own_loop(task: Any) -> Any:
    """Iterate over windows of K = 2, then do the same by calls."""
    found = []
    for is_open in (False, True):
        strategy = DDPStrategy()
        strategy.setup()
        torch.manual_seed(0)
        model = strategy.prepare(task.configure_model())
        optimizer, data = task.configure_optimizer(model), task.train_data()
        options = {"micro_batch_size": N, "accumulate_grad_batches": 2, "gradient_clip_norm": 0.5, "shuffle": False}
        accumulator = Accumulator(strategy, model, optimizer, data, weights=task.weights, **options)
        records = []
        for epoch in range(2):
            for window in accumulator.windows(epoch) if not is_open else ():
                for batch in window:
                    window.backward(task.loss(model, batch))
                outcome = window.update()
                records.append({"loss": outcome.loss, **outcome.metrics})
            for pieces in cut(len(task.x), 4 * N) if is_open else ():
                batches = [data[list(rows)] for rows in pieces[strategy.rank :: 2]]
                counts = [task.weights(batch) for batch in batches]
                weights = {name: sum(float(count[name]) for count in counts) for name in (counts[0] if counts else ())}
                window = accumulator.open(task.loss if epoch else None, weights)
                for batch in batches:
                    window.backward(batch if epoch else task.loss(model, batch))
                outcome = window.update()
                records.append({"loss": outcome.loss, **outcome.metrics})
        strategy.teardown()
        found.append((parameters(model), records))
    return found


def test_loops_of_ones_own() -> None:
    task = Groups(2 * 4 * N + 2, TERMS, masked=range(4 * N))
    for results in zip(*run(2, own_loop, task), strict=True):
        check(results, reference(task, cut(len(task.x), 4 * N) * 2, clip=0.5))


class Stream(Groups):
    """Ready micro-batches: of each process its own, fewer on the second."""

    def train_data(self) -> Any:
        rank = torch.distributed.get_rank()
        parts = [part.split(N) for part in super().train_data().tensors]
        return Batches([*zip(*parts, strict=True)][rank::2])


class Batches:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_streams() -> None:
    task = Stream(2 * 4 * N + 2)
    check(run(2, fit, task, "ddp", 2, 0.5), reference(task, cut(len(task.x), 4 * N) * 2, clip=0.5))


@pytest.mark.parametrize("kind", [Groups, GroupsTwice])
def test_a_resumed_run_is_the_one_that_was_not_stopped_to_the_bit(kind: Any, tmp_path: Path) -> None:
    task = kind(2 * 4 * N + 2, TERMS, masked=range(4 * N))
    whole = run(2, fit, task, "ddp", 2, 0.5)
    stopped = run(2, partial(fit, run_dir=str(tmp_path / "run"), max_updates=4), task, "ddp", 2, 0.5)
    resumed = run(2, partial(fit, run_dir=str(tmp_path / "run")), task, "ddp", 2, 0.5)
    for (expected, records), (_, before), (found, after) in zip(whole, stopped, resumed, strict=True):
        assert torch.equal(found, expected)
        shown = ("loss", "weight", "grad_norm", *TERMS)
        assert [[r.get(name) for name in shown] for r in before + after] == [
            [r.get(name) for name in shown] for r in records
        ]


@pytest.mark.parametrize("kind", [Groups, GroupsTwice])
def test_the_loss_scale_of_fp16_leaves_no_trace(kind: Any) -> None:
    task = kind(2 * 4 * N + 2)  # in float64, so that the scale alone could differ
    found = run(2, partial(fit, precision="fp16"), task, "ddp", 2, 0.5)
    check(found, reference(task, cut(len(task.x), 4 * N) * 2, clip=0.5))
