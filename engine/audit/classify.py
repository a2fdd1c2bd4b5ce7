"""The verdict of a case: the recorded gradients, compared with those that each known fault would give.

A name is given only if that fault alone predicts every gradient of every process, and the traffic is that of one
reduction. Everything else is "not exact, not named".
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.audit.cases import EPOCHS, Case, N
from engine.audit.recorder import Step
from engine.conformance.reference import Regression, difference

EXACT, UNNAMED, CARRIED = "exact", "not exact, not named", "tail carried into the next epoch"
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
NAMED = 2e-5  # a fault's gradient is met to rounding, in float32 as well
TOLD_APART = 1e-3  # a fault that predicts the exact gradient says nothing


class Sum(NamedTuple):
    """The gradient of a sum of losses, and the weight of the sum."""

    gradient: Tensor
    weight: float

    @property
    def mean(self) -> Tensor:
        """The gradient of the mean; zero if nothing has a weight."""
        return self.gradient / (self.weight or 1.0)


Window = list[list[Sum]]  # by process, by micro-batch


@dataclass
class Found:
    """A verdict, the largest relative error and difference between processes, and the traffic of an update."""

    verdict: str
    error: float = float("nan")
    difference: float = float("nan")
    collectives: int = 0
    reduced_bytes: int = 0
    gradient_bytes: int = 0
    detail: str = ""
    case: str = ""
    seconds: float = 0.0


def judge(case: Case, runs: Sequence[Sequence[Sequence[Step]]], from_dataset: bool, make: Callable[[], nn.Module],
          dtype: torch.dtype) -> Found:  # fmt: skip
    """Return the verdict on a case, whose one or two runs have left these steps, by process."""
    if any(len(set(map(len, run))) > 1 for run in runs):
        return Found(UNNAMED, detail=f"processes made {[list(map(len, run)) for run in runs]} updates")
    steps = [list(update) for run in runs for update in zip(*run, strict=True)]
    seen = [[row for step in update for rows in step.micro_batches for row in rows] for update in steps]
    if not steps or not all(seen):
        return Found(UNNAMED, detail="an update has no samples" if steps else "no update was made")
    if any(-1 in rows for rows in seen):
        return Found(UNNAMED, detail="the model was given samples that are not the job's")
    model, first = make().double(), steps[0][0].parameters
    if any(step.gradient.shape != nn.utils.parameters_to_vector(model.parameters()).shape for step in steps[0]):
        return Found(UNNAMED, detail="the optimizer holds other parameters than the model")
    if any(torch.equal(run[0][0].parameters, first) for run in runs[1:] if run[0]):
        return Found(UNNAMED, detail="the second run starts from the first parameters again")
    once = [[step._replace(micro_batches=list(dict.fromkeys(step.micro_batches))) for step in own] for own in steps]
    found, as_seen = (_Judge(case, way, from_dataset, model).found(dtype) for way in (once, steps))
    return found if found.error <= LIMITS[dtype] else as_seen  # two passes, or a second try, may count as one


class _Judge:
    def __init__(self, case: Case, steps: list[list[Step]], from_dataset: bool, model: nn.Module) -> None:
        self.steps, self.K = steps, case.K
        self.seen = [[row for step in update for rows in step.micro_batches for row in rows] for update in steps]
        self.planned = case.planned(from_dataset)
        given = [row for own in case.pieces for rows in own for row in rows]
        self.rows = Counter(range(case.samples) if from_dataset else given)
        self.windows = [[_sums(case.task, model, step) for step in update] for update in steps]
        self.exact = [_one_batch(window) for window in self.windows]

    def found(self, dtype: torch.dtype) -> Found:
        """Return the verdict, with the figures that led to it."""
        pairs = [(step, update[0]) for update in self.steps for step in update]
        parted = max(_off(own, other) for step, first in pairs for own, other in zip(step[:2], first[:2], strict=True))
        last, size = self.steps[-1][0], self.exact[0].numel() * dtype.itemsize  # the first ones still build things
        found = Found(UNNAMED, float("nan"), parted, last.collectives, last.reduced_bytes, size)
        if not all(bool(step.gradient.isfinite().all()) for step, _ in pairs):
            found.error, found.detail = float("inf"), "a gradient is not finite"
            return found
        is_planned = self._is_as_planned()
        if is_planned:
            found.error = self._off(self.exact)
            names = {EXACT} if found.error <= LIMITS[dtype] else self._faults()
        else:
            found.detail = "updates are not made of the samples they should be"
            names = {self._misplaced()}
        verdict = names.pop() if len(names) == 1 else UNNAMED
        if parted > NAMED and verdict != "not reduced":
            alone = verdict == EXACT or (is_planned and self._some_processes_are_exact())
            verdict = "replicas differ" if alone else UNNAMED
        several = [update[0] for update in self.steps if len(update) > 1 and len(update[0].micro_batches) > 1]
        most = [(step.reduced_bytes - step.bytes_once) / len(step.micro_batches) for step in several]
        if several and min(most) >= size > max(step.bytes_once for step in several):
            found.detail = "" if verdict in (EXACT, UNNAMED) else f"{verdict}, and reduced at each micro-batch"
            verdict = "reduced at each micro-batch" if verdict == EXACT else UNNAMED
        found.verdict = verdict
        return found

    def _is_as_planned(self) -> bool:
        """Whether each update has as many samples as planned, and each epoch has each sample once."""
        epochs = [Counter[int]() for _ in range(EPOCHS)]
        for rows, update in zip(self.seen, self.planned, strict=False):
            epochs[update.epoch].update(rows)
        has_sizes = [len(rows) for rows in self.seen] == [update.samples for update in self.planned]
        return has_sizes and all(epoch == self.rows for epoch in epochs)

    def _off(self, predictions: Sequence[Tensor | list[Tensor]]) -> float:
        """Return the largest relative distance of a recorded gradient from its prediction, for all or by process."""
        return max(
            _off(step.gradient, predicted[rank] if isinstance(predicted, list) else predicted)
            for update, predicted in zip(self.steps, predictions, strict=True)
            for rank, step in enumerate(update)
        )

    def _faults(self) -> set[str]:
        """Return the names of the faults that give these gradients from windows that are as planned."""
        if not all(map(all, self.windows)):
            return set()
        pairs = zip(self.windows, self.planned, strict=True)
        by_fault = zip(*(list(_predictions(window, update.K)) for window, update in pairs), strict=True)
        return {rows[0][0] for rows in by_fault if self._fits([predicted for _, predicted in rows], self.exact)}

    def _fits(self, predictions: Sequence[Tensor | list[Tensor]], exact: Sequence[Tensor]) -> bool:
        """Whether these are the recorded gradients, and not the exact ones."""
        differs = any(
            _off(tensor, one) > TOLD_APART
            for predicted, one in zip(predictions, exact, strict=True)
            for tensor in (predicted if isinstance(predicted, list) else [predicted])
        )
        return differs and self._off(predictions) <= NAMED

    def _some_processes_are_exact(self) -> bool:
        off = [[_off(step.gradient, one) for step in own] for own, one in zip(self.steps, self.exact, strict=True)]
        return any(max(own) <= NAMED for own in zip(*off, strict=False))

    def _misplaced(self) -> str:
        """Return the name of the fault if samples are in other updates than planned, in none, or in several."""
        counts = {tuple(map(len, own)) for own in zip(*self.windows, strict=True)}  # by update, on each process
        streams = [[rows for step in own for rows in step.micro_batches] for own in zip(*self.steps, strict=True)]
        used = Counter(row for rows in self.seen for row in rows)
        has_tail = not all(update.is_full for update in self.planned) and max(used.values()) <= EPOCHS
        epoch = 2 * self.K - 1  # micro-batches of each process, if there is a tail
        keeps_tail = Counter(row for own in streams for rows in own[:epoch] for row in rows) == self.rows
        is_cut_alike = {len(rows) for own in streams for rows in own} == {N}
        if has_tail and is_cut_alike and counts in ({(self.K, self.K)}, {(self.K, epoch)}):
            own = [_one_batch([sums[-self.K :] for sums in window]) for window in self.windows]
            if self._off(own) <= NAMED:
                return "tail dropped"
            scaled = [_average([_average([s.mean for s in o]) * len(o) for o in w]) / self.K for w in self.windows]
            if keeps_tail and (self._fits(self.exact, own) or self._fits(scaled, own)):
                return CARRIED
        if self._off(self.exact) > NAMED:
            return UNNAMED
        if has_tail and keeps_tail and {count for own in counts for count in own[:-1]} == {self.K}:
            return CARRIED
        twice, never = max(used.values()) > EPOCHS, any(used[row] < EPOCHS for row in self.rows)
        names = {(True, False): "samples seen twice", (False, True): "samples never seen", (False, False): UNNAMED}
        return names.get((twice, never), "samples seen twice or never")


def _predictions(window: Window, K: int) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Yield each fault's name with the gradient that it gives, on all processes or on each; several ways for some."""
    whole, most = _pooled([part for own in window for part in own]), max(len(own) for own in window)
    one, local = whole.mean, [_pooled(own) for own in window]
    for number in (K, most):
        yield "factor K", one * number
        yield "factor 1/K", one / number
    yield "factor P", one * len(window)
    yield "factor 1/P", one / len(window)
    yield "tail divided by K", one * (most / K)
    for last in (_pooled([own[-1] for own in window]).mean, _average([own[-1].mean for own in window])):
        yield "only the last micro-batch", last
        yield "only the last micro-batch", last / K
    yield "mean of means", _average([_average([part.mean for part in own]) for own in window])
    yield "mean of means", _average([part.mean for own in window for part in own])
    yield "mean of means", _average([part.mean for part in local])
    at_once = [[own[j] for own in window if j < len(own)] for j in range(most)]
    yield "mean of means", _average([_pooled(parts).mean for parts in at_once])
    yield "not reduced", [part.mean for part in local]
    yield "not reduced", [part.gradient / whole.weight for part in local]


def _sums(task: Regression, model: nn.Module, step: Step) -> list[Sum]:
    nn.utils.vector_to_parameters(step.parameters, model.parameters())
    sums = []
    for rows in step.micro_batches:
        weight = float(task.weight[list(rows)].sum())
        mean = torch.cat([g.flatten() for g in task.gradient(model, rows)])
        sums.append(Sum(mean * weight if weight else torch.zeros_like(mean), weight))
    return sums


def _pooled(sums: Sequence[Sum]) -> Sum:
    return Sum(torch.stack([one.gradient for one in sums]).sum(0), sum(one.weight for one in sums))


def _one_batch(window: Window) -> Tensor:
    return _pooled([one for own in window for one in own]).mean


def _average(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _off(found: Tensor, expected: Tensor) -> float:
    return difference({"": found}, {"": expected})
