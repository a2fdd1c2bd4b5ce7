"""The verdict of a case: the recorded gradients, compared with those that each known fault would give.

A name is given only if that fault alone predicts every gradient of every process, and the traffic is that of one
reduction. Everything else is "not exact, not named".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.audit.cases import EPOCHS, Case, Planned, Rows
from engine.audit.recorder import Log, Step
from engine.conformance.reference import Regression, difference

EXACT, UNNAMED = "exact", "not exact, not named"
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
NAMED = 2e-5  # a fault's gradient is met to rounding, in float32 as well
TOLD_APART = 1e-3  # faults that predict the exact gradient say nothing


class Sum(NamedTuple):
    """The gradient of a sum of losses, and the weight of the sum."""

    gradient: Tensor
    weight: float

    @property
    def mean(self) -> Tensor:
        """The gradient of the mean; zero if nothing has a weight."""
        return self.gradient / (self.weight or 1.0)


Window = list[list[Sum]]  # by process, by micro-batch
Prediction = Tensor | list[Tensor]  # for all processes, or for each


@dataclass
class Found:
    """A verdict, the largest relative error, the processes' largest difference, and the traffic of an update."""

    verdict: str
    error: float = float("nan")
    difference: float = float("nan")
    collectives: int = 0
    reduced_bytes: int = 0
    gradient_bytes: int = 0
    detail: str = ""


def judge(case: Case, runs: Sequence[Sequence[Log]], make: Callable[[], nn.Module], dtype: torch.dtype) -> Found:
    """Return the verdict on a case, whose one or two runs have left these logs, by process."""
    counts = [[len(log.steps) for log in logs] for logs in runs]
    if any(len(set(row)) > 1 for row in counts):
        return Found(UNNAMED, detail=f"processes made {counts} updates")
    steps = [list(updates) for logs in runs for updates in zip(*(log.steps for log in logs), strict=True)]
    seen = [{row for step in update for rows in step.micro_batches for row in rows} for update in steps]
    if not steps or not all(seen):
        return Found(UNNAMED, detail="no update was made" if not steps else "an update has no samples")
    if any(-1 in rows for rows in seen):
        return Found(UNNAMED, detail="the model was given samples that are not the job's")
    from_dataset = runs[0][0].from_dataset
    return _Judge(case, steps, from_dataset, make, dtype).found()


class _Judge:
    def __init__(
        self, case: Case, steps: list[list[Step]], from_dataset: bool, make: Callable[[], nn.Module], dtype: torch.dtype
    ) -> None:
        self.steps, self.dtype, self.K = steps, dtype, case.K
        self.planned, self.rows = case.planned(from_dataset), case.rows(from_dataset)
        model = make().double()
        self.windows = [[_sums(case.task, model, step) for step in update] for update in steps]
        self.exact = [_one_batch(window) for window in self.windows]
        self.size = self.exact[0].numel() * dtype.itemsize

    def found(self) -> Found:
        pairs = [(step, update[0]) for update in self.steps for step in update]
        parted = max(_off(step.parameters, first.parameters) for step, first in pairs)
        apart = max(_off(step.gradient, first.gradient) for step, first in pairs)
        last = self.steps[-1][0]  # the first ones still build things
        found = Found(
            UNNAMED,
            difference=max(parted, apart),
            collectives=last.collectives,
            reduced_bytes=last.reduced_bytes,
            gradient_bytes=self.size,
        )
        if not all(bool(step.gradient.isfinite().all()) for update in self.steps for step in update):
            found.error, found.detail = float("inf"), "a gradient is not finite"
            return found
        if self._is_as_planned():
            found.error = self._off(self.exact)
            names = [EXACT] if found.error <= LIMITS[self.dtype] else sorted(set(self._faults()))
        else:
            found.detail = "updates are not made of the samples they should be"
            names = [self._misplaced()]
        verdict = names[0] if len(names) == 1 else UNNAMED
        if found.difference > NAMED and verdict != "not reduced":
            alone = verdict == EXACT or self._some_processes_are_exact()
            verdict = "replicas differ" if alone else UNNAMED
        if self._reduces_each_micro_batch():
            found.detail = "" if verdict in (EXACT, UNNAMED) else f"{verdict}, and reduced at each micro-batch"
            verdict = "reduced at each micro-batch" if verdict == EXACT else UNNAMED
        found.verdict = verdict
        return found

    def _is_as_planned(self) -> bool:
        """Whether each update has as many samples as planned, and each epoch has each sample once."""
        seen = [[row for step in update for rows in step.micro_batches for row in rows] for update in self.steps]
        if [len(rows) for rows in seen] != [update.samples for update in self.planned]:
            return False
        epochs = [Counter[int]() for _ in range(EPOCHS)]
        for rows, update in zip(seen, self.planned, strict=True):
            epochs[update.epoch].update(rows)
        return all(epoch == Counter(self.rows) for epoch in epochs)

    def _off(self, predictions: Sequence[Prediction]) -> float:
        """Return the largest relative distance of a recorded gradient from its prediction."""
        return max(
            _off(step.gradient, predicted[rank] if isinstance(predicted, list) else predicted)
            for update, predicted in zip(self.steps, predictions, strict=True)
            for rank, step in enumerate(update)
        )

    def _fits(self, predictions: Sequence[Prediction], exact: Sequence[Tensor] | None = None) -> bool:
        """Whether these are the recorded gradients, and not those of one big batch."""
        differs = any(
            _off(tensor, one) > TOLD_APART
            for predicted, one in zip(predictions, self.exact if exact is None else exact, strict=True)
            for tensor in (predicted if isinstance(predicted, list) else [predicted])
        )
        return differs and self._off(predictions) <= NAMED

    def _faults(self) -> Iterator[str]:
        """Yield the names of the faults that give these gradients from windows that are as planned."""
        for name, predict in _FAULTS if all(map(all, self.windows)) else ():
            if self._fits([predict(window, update) for window, update in zip(self.windows, self.planned, strict=True)]):
                yield name

    def _some_processes_are_exact(self) -> bool:
        if len({len(update) for update in self.steps}) > 1 or not self._is_as_planned():
            return False
        good = [
            all(_off(update[rank].gradient, one) <= NAMED for update, one in zip(self.steps, self.exact, strict=True))
            for rank in range(len(self.steps[0]))
        ]
        return any(good)

    def _misplaced(self) -> str:
        """Return the name of the fault if samples are in other updates than planned, in none, or in several."""
        full = [update for update in self.planned if update.is_full]
        has_tail = len(full) < len(self.planned)
        own = [[sums[-self.K :] for sums in window] for window in self.windows]
        proper = [_one_batch(window) for window in own]
        used = Counter(row for update in self.steps for step in update for rows in step.micro_batches for row in rows)
        kept = Counter(
            row for update in self.steps for step in update for rows in step.micro_batches[-self.K :] for row in rows
        )
        at_most_once = max(kept.values()) <= EPOCHS
        if has_tail and at_most_once and len(full) == len(self.steps) and kept.total() == sum(u.samples for u in full):
            if self._off(proper) <= NAMED:
                return "tail dropped"
            scaled = [_scaled(window, self.K) for window in self.windows]
            if self._fits(self.exact, proper) or self._fits(scaled, proper):
                return "tail carried into the next epoch"
        if self._off(self.exact) > NAMED:
            return UNNAMED
        micro_batches = [len(step.micro_batches) for update in self.steps for step in update]
        if has_tail and max(used.values()) <= EPOCHS and set(micro_batches[: -len(self.steps[-1])]) == {self.K}:
            return "tail carried into the next epoch"
        twice = any(count > EPOCHS for count in used.values())
        never = any(used[row] < EPOCHS for row in self.rows)
        return {(True, False): "samples seen twice", (False, True): "samples never seen"}.get(
            (twice, never), "samples seen twice or never" if twice else UNNAMED
        )

    def _reduces_each_micro_batch(self) -> bool:
        """Whether each update of several micro-batches has reduced the gradient as often."""
        several = [update[0] for update in self.steps if len(update) > 1 and len(update[0].micro_batches) > 1]
        return bool(several) and all(step.reduced_bytes >= self.size * len(step.micro_batches) for step in several)


def _sums(task: Regression, model: nn.Module, step: Step) -> list[Sum]:
    nn.utils.vector_to_parameters(step.parameters, model.parameters())
    return [_sum(task, model, rows) for rows in step.micro_batches]


def _sum(task: Regression, model: nn.Module, rows: Rows) -> Sum:
    weight = float(task.weight[list(rows)].sum())
    mean = torch.cat([g.flatten() for g in task.gradient(model, rows)])
    return Sum(mean * weight if weight else torch.zeros_like(mean), weight)


def _pooled(sums: Sequence[Sum]) -> Sum:
    return Sum(torch.stack([one.gradient for one in sums]).sum(0), sum(one.weight for one in sums))


def _one_batch(window: Window) -> Tensor:
    return _pooled([one for own in window for one in own]).mean


def _average(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _scaled(window: Window, K: int) -> Tensor:
    """Return the processes' average of (sum of the micro-batches' means) / K, which is what the textbook loop makes."""
    return _average([_average([one.mean for one in own]) * (len(own) / K) for own in window])


def _off(found: Tensor, expected: Tensor) -> float:
    return difference({"": found}, {"": expected})


def _most(window: Window) -> int:
    return max(len(own) for own in window)


def _local(window: Window, _: Planned) -> Prediction:
    return [_pooled(own).mean for own in window]


def _local_share(window: Window, _: Planned) -> Prediction:
    whole = _pooled([one for own in window for one in own]).weight
    return [_pooled(own).gradient / whole for own in window]


def _by_number(window: Window, _: Planned) -> Prediction:
    """Return the average over micro-batches, each pooled over the processes."""
    return _average([_pooled([own[j] for own in window if j < len(own)]).mean for j in range(_most(window))])


_FAULTS: list[tuple[str, Callable[[Window, Planned], Prediction]]] = [
    ("factor K", lambda window, update: _one_batch(window) * update.K),
    ("factor K", lambda window, _: _one_batch(window) * _most(window)),
    ("factor P", lambda window, _: _one_batch(window) * len(window)),
    ("factor 1/K", lambda window, update: _one_batch(window) / update.K),
    ("factor 1/K", lambda window, _: _one_batch(window) / _most(window)),
    ("factor 1/P", lambda window, _: _one_batch(window) / len(window)),
    ("only the last micro-batch", lambda window, _: _pooled([own[-1] for own in window]).mean),
    ("only the last micro-batch", lambda window, _: _average([own[-1].mean for own in window])),
    ("only the last micro-batch", lambda window, update: _pooled([own[-1] for own in window]).mean / update.K),
    ("only the last micro-batch", lambda window, update: _average([own[-1].mean for own in window]) / update.K),
    ("mean of means", lambda window, _: _average([_average([one.mean for one in own]) for own in window])),
    ("mean of means", lambda window, _: _average([one.mean for own in window for one in own])),
    ("mean of means", lambda window, _: _average([_pooled(own).mean for own in window])),
    ("mean of means", _by_number),
    ("tail divided by K", lambda window, update: _one_batch(window) * (_most(window) / update.K)),
    ("not reduced", _local),
    ("not reduced", _local_share),
]
