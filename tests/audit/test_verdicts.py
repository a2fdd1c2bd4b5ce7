"""Verdicts: an exact loop is exact, each broken one is named, and two faults at once are not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.audit import CASES, Adapter, audit
from engine.audit.fixture import assert_exact  # noqa: F401
from tests.kit.broken_loops import EVEN, NAMED, RAGGED, SHORT, broken, total, train

EVERYDAY = (
    "factor K",
    "mean of means",
    "tail carried into the next epoch",
    "not reduced",
    "reduced at each micro-batch",
)
PADDED, RESUME = CASES[3], CASES[7]


def verdict(loop: Any, case: str, P: int = 2, **options: Any) -> str:
    return audit(loop, P, [case], **options).verdicts[case]


def test_an_exact_loop_passes(assert_exact: Any) -> None:  # noqa: F811
    assert_exact(train, processes=2, cases=[PADDED, RESUME])


@pytest.mark.slow
@pytest.mark.parametrize("P", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_exact_loop_is_exact_in_each_case(P: int, dtype: torch.dtype) -> None:
    report = audit(Adapter(train, cases=CASES), P, dtype=dtype)
    assert report.exact, report.text()
    assert len(report.rows) == len(CASES) - (P == 1)


@pytest.mark.parametrize(
    "fault", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in NAMED]
)
def test_each_fault_is_named(fault: str) -> None:
    seconds = 8 if fault == "hang" else 60
    assert verdict(broken(fault), NAMED[fault], seconds=seconds) == fault


@pytest.mark.slow
@pytest.mark.parametrize("P", [3, 4])
@pytest.mark.parametrize("fault", [name for name in NAMED if name not in ("hang", "crash on one process")])
def test_each_fault_is_named_on_more_processes_in_float32(fault: str, P: int) -> None:
    assert verdict(broken(fault), NAMED[fault], P, dtype=torch.float32) == fault


@pytest.mark.parametrize(
    ("faults", "case"),
    [
        (("factor P", "tail dropped"), SHORT),
        pytest.param(("factor 1/K", "tail divided by K"), SHORT, marks=pytest.mark.slow),
        pytest.param(("factor 1/K", "tail carried into the next epoch"), SHORT, marks=pytest.mark.slow),
        pytest.param(("factor K", "mean of means"), RAGGED, marks=pytest.mark.slow),
        pytest.param(("factor K", "factor P"), EVEN, marks=pytest.mark.slow),
        pytest.param(("not reduced", "only the last micro-batch"), EVEN, marks=pytest.mark.slow),
        (("reduced at each micro-batch", "factor 1/K"), EVEN),
        pytest.param(("samples seen twice", "factor K"), EVEN, marks=pytest.mark.slow),
        pytest.param(("replicas differ", "factor K"), EVEN, marks=pytest.mark.slow),
    ],
)
def test_two_faults_at_once_have_no_name(faults: tuple[str, ...], case: str) -> None:
    assert verdict(broken(*faults), case) == "not exact, not named"


def test_rounding_has_no_name() -> None:
    found = audit(broken("float32 rounding"), 2, [EVEN]).rows[0]
    assert found.verdict == "not exact, not named"
    assert 1e-9 < found.error < 1e-7
    assert verdict(broken("float32 rounding"), EVEN, dtype=torch.float32) == "exact"


def test_a_process_that_keeps_its_own_gradient_differs() -> None:
    assert verdict(broken("one process keeps its own gradient"), EVEN) == "replicas differ"


def other_shape(job: Any, forgets: bool = False) -> None:
    """Steps with a closure, runs each forward twice, and reads the loss of a batch that it does not train on."""
    torch.distributed.init_process_group("gloo")
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    batches = job.micro_batches * job.epochs

    def window(start: int) -> None:
        optimizer.zero_grad()
        own = batches[start : start + job.K]
        for batch in own:
            job.loss(job.model, batch).item()  # only to look at
            if not forgets or batch is own[-1]:
                job.loss(job.model, batch).backward()
        for p in job.model.parameters():
            p.grad = total(p.grad) / (job.K * job.P)

    for start in range(0, len(batches), job.K):
        optimizer.step(partial(window, start))


def test_a_loop_of_another_shape() -> None:
    assert verdict(other_shape, EVEN) == "exact"
    assert verdict(partial(other_shape, forgets=True), EVEN) == "only the last micro-batch"


def test_a_trainer_that_fails_everywhere_has_no_name_and_says_why() -> None:
    def refuses(job: Any) -> None:
        raise NotImplementedError("no such case")

    found = audit(refuses, 2, [EVEN]).rows[0]
    assert found.verdict == "not exact, not named"
    assert "NotImplementedError: no such case" in found.detail
