"""Windows driven by calls: the same samples in any number of calls, on any processes, make the same update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from engine import Accumulator, Loss
from strategies import find
from tests.kit.processes import on_processes, run
from tests.kit.reference import Branches, data, mlp, parameters
from tests.kit.terms import LR

SAMPLES = 24
X, Y = data(SAMPLES)


def weights() -> torch.Tensor:
    return 1 + torch.arange(SAMPLES, dtype=torch.float64) % 3


def mean(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def loop(kind: Any, windows: Any, form: str, clip: float | None = None, model: Any = mlp, **options: Any) -> Any:
    """Make an update of each window; `windows[w][rank]` are the calls of a process, each the indices of its samples."""
    strategy = find(kind)(**options)
    strategy.setup()
    torch.manual_seed(0)
    net = strategy.prepare(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    accumulator = Accumulator(strategy, net, optimizer, gradient_clip_norm=clip)
    outcomes = []
    for calls in windows:
        window = accumulator.open(mean if form == "batch" else None)
        for rows in calls[strategy.rank]:
            rows = list(rows)
            if form == "batch":
                window.backward((X[rows], Y[rows]), len(rows))
            elif form == "mean":
                window.backward((net(X[rows]) - Y[rows]).square().mean(), samples=len(rows))
            else:
                losses = (net(X[rows]) - Y[rows]).square()[:, 0] * (w := weights()[rows])
                window.backward(Loss(losses.sum(), w.sum()), len(rows))
        outcomes.append(window.update())
    strategy.teardown()
    return parameters(net), [(o.loss, o.weight, o.samples) for o in outcomes]


def big_batch(form: str, rows_of_windows: Any, clip: float | None = None, model: Any = mlp) -> Any:
    torch.manual_seed(0)
    net, means = model(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for rows in rows_of_windows:
        w = weights()[rows] if form == "loss" else torch.ones(len(rows), dtype=torch.float64)
        loss = ((net(X[rows]) - Y[rows]).square()[:, 0] * w).sum() / w.sum()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        means.append((loss.item(), w.sum().item(), len(rows)))
    return parameters(net), means


def split(rows: Any, P: int, calls: int) -> Any:
    """Give each process its share of the samples, in that many calls or more."""
    shares = [list(rows)[rank::P] for rank in range(P)]
    return [[part for i in range(calls) if (part := share[i::calls])] for share in shares]


def check(results: Any, expected: Any) -> None:
    for found, means in results:
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-12)
        assert means == [pytest.approx(mean, rel=1e-12) for mean in expected[1]]


@pytest.mark.parametrize("P", [1, 2, 4])
def test_one_update_in_1_3_or_7_calls(P: int) -> None:
    windows = [list(range(10)), list(range(10, SAMPLES)), list(range(3))]

    @on_processes(P)
    def by_rank() -> Any:
        splits = [[split(rows, P, calls) for rows in windows] for calls in (1, 3, 7)]
        return [(loop("ddp", calls, form, 0.5), form) for calls in splits for form in ("loss", "mean", "batch")]

    for results in zip(*by_rank, strict=True):
        form = results[0][1]
        check([found for found, _ in results], big_batch(form, windows, 0.5))


def drawn(P: int) -> Any:
    """Draw a split of some samples among processes, and of each share into calls: some processes have none."""
    rows = st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=8)
    return st.lists(st.lists(rows, max_size=4), min_size=P, max_size=P).filter(any)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls=drawn(1), second=drawn(1))
def test_any_split_into_calls(calls: Any, second: Any) -> None:
    windows = [calls, second]
    flat = [[i for share in window for rows in share for i in rows] for window in windows]
    check([loop("single", windows, "loss")], big_batch("loss", flat))


@pytest.mark.parametrize("P", [2, 3])
def test_any_split_over_processes(P: int) -> None:
    examples: list[Any] = []

    @settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @given(calls=drawn(P))
    def draw(calls: Any) -> None:
        examples.append(calls)

    draw()
    by_rank = run(P, lambda: [loop("ddp", [calls], "loss") for calls in examples])
    for calls, *results in zip(examples, *by_rank, strict=True):
        check(results, big_batch("loss", [[i for share in calls for rows in share for i in rows]]))


def test_parameters_that_a_process_does_not_use() -> None:
    windows = [[[[0], [1, 2]], [[3]]]]
    found = run(2, lambda: loop("ddp", windows, "mean", model=Branches, find_unused_parameters=True))
    check(found, big_batch("mean", [[0, 1, 2, 3]], model=lambda: PerSample()))


class PerSample(Branches):
    """The calls of `unused` as one batch: each call takes one branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(PerSample, self).forward(part) for part in (x[:1], x[1:3], x[3:])])


def test_what_one_process_drops_all_drop() -> None:
    @on_processes(2)
    def results() -> Any:
        strategy = find("ddp")()
        strategy.setup()
        torch.manual_seed(0)
        net = strategy.prepare(mlp())
        accumulator = Accumulator(strategy, net, torch.optim.SGD(net.parameters(), lr=LR))
        rows = list(range(strategy.rank, 10, 2))
        for is_dropped in (True, False, True):
            window = accumulator.open(mean)
            window.backward((X[rows], Y[rows]), len(rows))
            if is_dropped and strategy.rank == 0:
                window.drop()
            else:
                assert window.update().aborted == is_dropped
        return parameters(net), accumulator.update, accumulator.samples

    for found, updates, samples in results:
        torch.testing.assert_close(found, big_batch("mean", [list(range(10))])[0], rtol=0, atol=1e-12)
        assert (updates, samples) == (1, 10)
