"""Whatever the data, windows, weights and processes: each update of a real run is that of ONE big batch (float64)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from engine import GradientAccumulationScheduler, Loss, Trainer
from engine.plan.schedule import make_schedule
from engine.plan.windows import Plan
from strategies import DPStrategy
from tests.kit.processes import run
from tests.kit.reference import Regression, Samples, Watch, parameters
from tests.kit.schedules import UNITS, schedule_of, schedules

MORE = int(os.environ.get("TALLY_EXAMPLES", "0"))  # 0: the same examples each time; n: n times as many, and others
CAMPAIGN = (pytest.mark.slow, pytest.mark.campaign)
LONGEST = 17  # epochs, and updates, of a run that updates alone bound

# torch warns where the first update of all is skipped
pytestmark = [pytest.mark.timeout(300 * max(MORE, 1)), pytest.mark.filterwarnings("ignore:Detected call of `lr_sche")]


def examples(number: int, shrinks: bool = True) -> settings:
    phases = [Phase.reuse, Phase.generate, *[Phase.shrink] * shrinks]
    options: Any = {"phases": phases, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
    return settings(max_examples=number * max(MORE, 1), derandomize=not MORE, deadline=None, **options)


FORMS: dict[str, tuple[list[float], Callable[[torch.Tensor], Any]]] = {
    "mean": ([1], torch.Tensor.item),
    "int": ([1, 0, 2, 7], lambda weight: int(weight)),
    "mean or int": ([1, 1, 1, 0], lambda weight: int(weight)),
    "float": ([1, 0, 0.125, 3.7, 1e5], torch.Tensor.item),
    "tensor": ([1, 0, 0.3, 1e-5, 40], torch.Tensor.clone),
    "int tensor": ([1, 0, 19], torch.Tensor.long),
}
"""What a task returns: the weights that samples have, and the type of their sum. "mean": a tensor where all are 1."""


@dataclass(frozen=True)
class Case:
    """One run. `pieces` are the micro-batches of each process's stream, or, in one row, the groups of an order."""

    P: int
    devices: int
    source: str
    pieces: list[list[list[int]]]
    form: str
    weights: list[float]
    broken: list[int]
    scheduling: dict[int, int]
    unit: Any
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, P: int) -> Case:
    source = draw(st.sampled_from(["tensors", "items", "indices", "groups", "stream"]))
    form = draw(st.sampled_from(list(FORMS)))
    samples = positions = draw(st.integers(1, 30 + 10 * P))
    pieces: list[list[list[int]]] = []
    if source in ("indices", "groups", "stream"):  # some samples several times, others not at all
        rows, least = (P, int(form == "mean")) if source == "stream" else (1, 1)
        own = st.lists(st.integers(least, 5), min_size=source != "stream", max_size=15)
        pieces = deal(draw(st.lists(own, min_size=rows, max_size=rows).filter(any)), samples)
        pieces = [[[i] for group in pieces[0] for i in group]] if source == "indices" else pieces
        positions = max(map(len, pieces))
    weights = (draw(st.lists(st.sampled_from(FORMS[form][0]), min_size=1, max_size=9)) * samples)[:samples]
    if form != "mean":  # and whole windows of weight 0
        start, stop = draw(st.integers(0, samples)), draw(st.integers(0, samples))
        weights[start:stop] = [0] * max(0, stop - start)
    broken = draw(st.lists(st.integers(0, samples - 1), max_size=draw(st.sampled_from([0, 0, 0, 2]))))
    B = draw(st.integers(1, 30)) if source != "stream" and draw(st.integers(0, 2)) == 2 else None
    unit = draw(st.sampled_from(UNITS))
    keys = st.integers(0, {"epoch": 2, "update": 6, "sample": 50}[unit])
    scheduling = {} if B else draw(st.dictionaries(keys, st.integers(1, 4), min_size=1, max_size=5))
    bounds = [(1, None), (2, None), (3, None), (3, 5), (3, 30), (None, LONGEST), (None, 3)]
    epochs, updates = draw(st.sampled_from(bounds))
    devices = draw(st.integers(1, 3)) if P == 1 else 1
    options = {
        "micro_batch_size": min(positions, draw(st.sampled_from([1, 2, 3, 6]))),
        "effective_batch_size": B,
        "max_epochs": epochs,
        "max_updates": updates,
        "gradient_clip_norm": draw(st.sampled_from([None, 0.05, 1.0])),
        "seed": draw(st.integers(0, 2)),
        "shuffle": draw(st.booleans()),
        "spread_windows": draw(st.booleans()),
    }
    return Case(P, devices, source, pieces, form, weights, broken, scheduling, unit, options)


def deal(sizes: list[list[int]], samples: int) -> list[list[list[int]]]:
    """Deal 0, 1, 2, ..., around and around, to pieces of these sizes."""
    rows = cycle(range(samples))
    return [[list(islice(rows, size)) for size in own] for own in sizes]


class Weighted(Regression):
    """Squared errors with a weight for each sample; the loss and gradient of a broken sample are not finite."""

    def __init__(self, case: Case) -> None:
        super().__init__(len(case.weights), lr=0.05)
        self.case = case
        self.weights = torch.tensor(case.weights, dtype=torch.float64)
        self.y[case.broken] = math.inf

    def configure_optimizer(self, model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.5)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))

    def train_data(self) -> Any:
        if self.case.source == "stream":
            rank = dist.get_rank() if self.case.P > 1 else 0
            indices = [torch.tensor(rows, dtype=torch.long) for rows in self.case.pieces[rank]]
            # the last tensor differs between processes: streams that are equal are refused
            batches = [(self.x[index], self.y[index], index, torch.full_like(index, rank)) for index in indices]
            return dict(enumerate(batches)).values()  # can be read once more, and not indexed
        return super().train_data() if self.case.source == "tensors" else Samples(self.x, self.y)

    def order(self, epoch: int) -> Any:
        if self.case.source == "groups":
            return queues(self.case, epoch)[0]
        return sum(queues(self.case, epoch)[0], []) if self.case.source == "indices" else None

    def errors(self, model: Any, x: Any, y: Any) -> Any:
        return (model(x) - y).square().squeeze(1)

    def loss(self, model: Any, batch: Any) -> Any:
        x, y, index, *_ = batch
        form, errors, weights = self.case.form, self.errors(model, x, y), self.weights[index]
        self.seen.append(index.tolist())
        assert len(index) <= self.case.options["micro_batch_size"] or self.case.source in ("groups", "stream")
        if "mean" in form and len(index) and weights.eq(1).all():
            return errors.mean()
        return Loss((weights * errors).sum(), FORMS[form][1](weights.sum()))


Run = tuple[torch.Tensor, list[dict[str, Any]], list[list[int]]]
"""Parameters, records, and the samples of each update: of the engine, those that this process had."""


def fit(case: Case) -> Run:
    task, watch = Weighted(case), Watch()
    options = {**case.options, "callbacks": [watch]}
    if case.scheduling.keys() <= {0}:
        options["accumulate_grad_batches"] = case.scheduling.get(0, 1)
    else:
        options["callbacks"].append(GradientAccumulationScheduler(case.scheduling, unit=case.unit))
    strategy = DPStrategy(case.devices, "cpu") if case.devices > 1 else "single" if case.P == 1 else "ddp"
    trainer = Trainer(strategy, **options)
    trainer.fit(task)
    assert trainer.total_updates == trainer.update or (case.source == "stream" and options["max_epochs"])
    return parameters(trainer.model), watch.records, watch.samples


# The reference


@cache
def shuffled_epochs(samples: int, seed: int) -> list[list[int]]:
    """The order of a run's epochs, whatever its windows: as a run that takes an epoch at once sees it."""
    task = Regression(samples)
    Trainer("single", micro_batch_size=samples, max_epochs=LONGEST, seed=seed).fit(task)
    assert [sorted(epoch) for epoch in task.seen] == [list(range(samples))] * LONGEST
    return task.seen


def queues(case: Case, epoch: int) -> list[list[list[int]]]:
    """What an epoch takes its windows from: one queue for all processes together, or the stream of each."""
    if case.source == "stream":
        return case.pieces
    if case.pieces:
        return [case.pieces[0][epoch:] + case.pieces[0][:epoch]]
    samples, seed = len(case.weights), case.options["seed"]
    return [[[i] for i in (shuffled_epochs(samples, seed)[epoch] if case.options["shuffle"] else range(samples))]]


def windows(case: Case) -> Iterator[tuple[int, int, list[int]]]:
    """The epoch, K and samples of each update: take what makes a window from the queues, until they are empty."""
    P, N, B = case.P, case.options["micro_batch_size"], case.options["effective_batch_size"]
    update = place = 0
    for epoch in range(case.options["max_epochs"] or LONGEST):
        left = queues(case, epoch)
        while any(left) and update < (case.options["max_updates"] or math.inf):
            now = {"epoch": epoch, "update": update, "sample": place}[case.unit]
            K = [1, *(K for first, K in sorted(case.scheduling.items()) if first <= now)][-1]
            K = math.ceil(B / (P * N)) if B else K
            size = K if case.source == "stream" else B or P * N * K
            taken = [piece for queue in left for piece in queue[:size]]
            left = [queue[size:] for queue in left]
            rows = [row for piece in taken for row in piece]
            yield epoch, K, rows
            update, place = update + 1, place + len(rows if case.source == "stream" else taken)


def reference(case: Case) -> Run:
    task, max_norm = Weighted(case), case.options["gradient_clip_norm"] or math.inf
    torch.manual_seed(case.options["seed"])
    model = task.configure_model()
    trained = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in trained]
    records, updates, samples, skipped = [], [], 0, 0
    for update, (epoch, K, rows) in enumerate(windows(case)):
        weight, lr = task.weights[rows].sum(), task.lr / (1 + update)
        loss = (task.weights[rows] * task.errors(model, task.x[rows], task.y[rows])).sum() / weight
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        samples += len(rows)
        record = {"epoch": epoch, "update": update + 1, "samples": samples, "effective_batch": len(rows), "lr": lr}
        record |= {"accumulate_grad_batches": K, "weight": weight.item(), "loss": loss.item()}
        if weight > 0 and math.isfinite(norm):
            record["grad_norm"] = norm
            for p, v, g in zip(trained, velocity, gradients, strict=True):
                v.mul_(0.5).add_(g * min(1.0, max_norm / (norm + 1e-6)))
                p.data -= lr * v
        else:
            skipped += 1
        records.append({**record, "skipped": skipped})
        updates.append(rows)
    return parameters(model), records, updates


def check(case: Case, replicas: Sequence[Run]) -> None:
    expected, records, updates = reference(case)
    for found, theirs, _ in replicas:
        assert torch.equal(found, replicas[0][0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert len(theirs) == len(records)
        for their, record in zip(theirs, records, strict=True):
            same = pytest.approx(list(record.values()), rel=1e-12, abs=1e-12, nan_ok=True)
            assert [their[name] for name in record] == same, list(record)
    shares = zip(*(seen for _, _, seen in replicas), strict=True)
    assert [sorted(sum(share, [])) for share in shares] == [sorted(rows) for rows in updates]


@pytest.mark.parametrize("number", [100, pytest.param(500, marks=CAMPAIGN)])
def test_any_run_of_one_process(number: int) -> None:
    @given(cases(P=1))
    @examples(number)
    def search(case: Case) -> None:
        check(case, [fit(case)])

    search()


@pytest.mark.parametrize("number", [3, pytest.param(12, marks=CAMPAIGN)])
@pytest.mark.parametrize("P", [2, 3, 4])
def test_any_run_of_several_processes(P: int, number: int) -> None:
    @given(st.lists(cases(P), min_size=1, max_size=20))
    @examples(number, shrinks=MORE > 0)
    def search(batch: list[Case]) -> None:
        by_rank = run(P, lambda: [fit(case) for case in batch], seconds=120)
        for case, *replicas in zip(batch, *by_rank, strict=True):
            note(f"in {case}")  # the last of these is the one that failed
            check(case, replicas)

    search()


# Arithmetic that test_plan.py does not ask for


@given(schedules, st.sampled_from(UNITS), st.integers(1, 60), st.integers(1, 5), st.integers(1, 90))
@examples(1000)
def test_updates_are_counted(scheduling: dict[int, int], unit: str, samples: int, epochs: int, last: int) -> None:
    plan = Plan(samples, schedule_of(scheduling, unit), max_epochs=epochs, max_updates=last)
    counts: list[int] = []
    for epoch in range(epochs):
        counts.append(len(list(plan.windows(epoch, sum(counts)))))
        assert plan.updates_in_epoch(epoch, sum(counts[:-1])) == counts[-1]
    assert plan.updates == sum(counts)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(2, 6), st.integers(1, 50))
@examples(500)
def test_an_effective_batch_is_cut_alike_for_any_P(samples: int, N: int, P: int, B: int) -> None:
    def cut(P: int, spread: bool = False) -> list[list[list[tuple[int, int, bool]]]]:
        plan = Plan(samples, make_schedule(N, lambda N, K: P * N * K, {}, B=B), max_epochs=1)
        return [[list(w.micro_batches(N, rank, P, spread)) for rank in range(P)] for w in plan.windows(0, 0)]

    for [alone], shares, spread in zip(cut(1), cut(P), cut(P, spread=True), strict=True):
        assert sorted((a, b) for share in shares for a, b, _ in share) == [(a, b) for a, b, _ in alone]
        for counts in (list(map(len, shares)), list(map(len, spread))):
            assert max(counts) <= min(min(counts) + 1, math.ceil(B / (P * N)))
        sizes = [b - a for share in spread for a, b, _ in share]
        assert max(sizes) <= min(min(sizes) + 1, N)
        assert len(set(map(len, spread))) == 1 or N == 1 or sum(sizes) < P  # of N = 1, one more cannot be cut
