"""Terms, each divided by a weight of its own: the gradient is that of one batch, whatever K and P are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from strategies import DDPStrategy, FSDPStrategy
from tests.kit.processes import run
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


def fit_forms(tasks: Any, strategy: Any, K: int) -> Any:
    return {name: fit(task, strategy, K, 0.5) for name, task in tasks.items()}


def check_forms(P: int, K: int, strategy: Any, tasks: dict[str, Any]) -> None:
    results = run(P, fit_forms, tasks, strategy, K)
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
