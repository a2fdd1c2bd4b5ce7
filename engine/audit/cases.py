"""The cases of an audit, and the job that an adapter is given in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine.conformance.reference import Regression, network
from engine.errors import UserError

N, EPOCHS = 4, 2
EVEN, SHORT, RAGGED = "even", "short last window", "ragged last micro-batch"
PADDED, ZERO, UNEVEN = "padded tokens", "weight 0", "uneven processes"
SCHEDULE, RESUME, ANOTHER_P = "K by schedule", "resume", "another P"
CASES = (EVEN, SHORT, RAGGED, PADDED, ZERO, UNEVEN, SCHEDULE, RESUME, ANOTHER_P)
"""The cases by name. An adapter declares the last three, since they ask more of it than K."""

Rows = tuple[int, ...]
Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trainer under audit.

    `train(job)` trains `job.model` on one process. `make()` returns the model, which maps (n, 5) to (n, 1), treats each
    sample alone and draws nothing. `cases` are those that the trainer claims to support.
    """

    train: Callable[[Job], object]
    make: Callable[[], nn.Module] = network
    cases: Sequence[str] = CASES[:6]

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in CASES:
                raise UserError(f"cases={name!r}: expected some of {', '.join(CASES)}.")


class Planned(NamedTuple):
    """An update as it should be: its epoch, K, samples over all processes, and whether it has K micro-batches."""

    epoch: int
    K: int
    samples: int
    is_full: bool


@dataclass(frozen=True, eq=False)
class Case:
    """A case on P processes: the rows of each process's micro-batches, and the number of samples of the dataset."""

    name: str
    P: int
    K: int
    pieces: list[list[Rows]]
    samples: int
    task: Regression
    second_K: int  # noqa: N815 - a word of this field
    second_P: int | None = None  # noqa: N815

    @property
    def stop_after(self) -> int | None:
        """The updates of the first run, if there are two runs."""
        return self.second_P and 1

    def rows(self, from_dataset: bool) -> list[int]:
        """Return the rows of an epoch."""
        return list(range(self.samples)) if from_dataset else [i for own in self.pieces for rows in own for i in rows]

    def planned(self, from_dataset: bool) -> list[Planned]:
        """Return the updates of the whole run."""
        updates = []
        for epoch in range(EPOCHS):
            K = self.second_K if epoch and self.name == SCHEDULE else self.K
            for start in range(0, len(self.pieces[0]), K):
                B = self.P * N * K
                taken = [len(rows) for own in self.pieces for rows in own[start : start + K]]
                samples = min(B, self.samples - start * self.P * N) if from_dataset else sum(taken)
                resumed = self.name == ANOTHER_P and len(updates) > 0
                full = start + K <= len(self.pieces[0])
                updates.append(Planned(epoch, self.second_K if resumed else K, samples, full))
        return updates

    def on(self, P: int) -> list[list[Rows]]:
        """Return the micro-batches dealt to P processes."""
        if P == self.P:
            return self.pieces
        return [[rows for pair in zip(*self.pieces, strict=True) for rows in pair][rank::P] for rank in range(P)]


def make_case(name: str, P: int, dtype: torch.dtype) -> Case:
    """Return the case of that name. K is no multiple of P, so that no two factors are the same number."""
    K = 4 if P == 3 else 3
    sizes = [N] * (P * (2 * K - (name == SHORT)))
    if name == RAGGED:
        sizes[-P:] = [N // 2] * P
    micro_batches = [tuple(range(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    pieces, samples = [micro_batches[rank::P] for rank in range(P)], sum(sizes)
    task = Regression(samples, tokens=True)
    task.x, task.y = task.x.to(dtype).double(), task.y.to(dtype).double()
    task.weight = torch.ones(samples, dtype=torch.float64)
    if name == PADDED:
        task.weight = torch.randint(0, 4, (samples,), generator=torch.Generator().manual_seed(1)).double()
    elif name == ZERO:
        task.weight[P * N : 2 * P * N] = 0  # the second micro-batch of each process
    elif name == UNEVEN:
        pieces[-1], samples = pieces[-1][:-2], samples - 1
    second_P = {RESUME: P, ANOTHER_P: 1 if P > 1 else 3}.get(name)
    second_K = P * K // second_P if second_P else 2
    return Case(name, P, K, pieces, samples, task, second_K, second_P)


@dataclass
class Job:
    """One run on one process: a model, and data as ready micro-batches or as a dataset of all processes.

    Ready micro-batches (`micro_batches`) are this process's, of one epoch. Or take `dataset`, and let the trainer share
    it out in micro-batches of `N` samples. A batch or sample is (x, y, weight): (n, 5), (n, 1), and (n,) valid tokens.
    """

    model: nn.Module
    rank: int
    P: int
    K: int
    schedule: dict[int, int]
    """K by epoch, if the case changes it: {0: K, 1: another}."""
    folder: str
    """Of all runs of a case, for checkpoints."""
    stop_after: int | None
    """Save and return after so many updates."""
    resumes: bool
    """Continue what the first run saved."""
    _tensors: tuple[Tensor, ...] = field(repr=False)
    _pieces: list[Rows] = field(repr=False)
    _samples: int = field(repr=False)
    from_dataset: bool = False
    N: int = N
    epochs: int = EPOCHS

    @property
    def micro_batches(self) -> list[tuple[Tensor, ...]]:
        """This process's micro-batches of each epoch."""
        return [tuple(values[list(rows)] for values in self._tensors) for rows in self._pieces]

    @property
    def dataset(self) -> TensorDataset:
        """The samples of all processes."""
        self.from_dataset = True
        return TensorDataset(*(values[: self._samples] for values in self._tensors))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the mean over the micro-batch's weight. It is NaN if the weight is 0, as torch's own losses are."""
        return self.loss_sum(model, batch) / batch[2].sum()

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the sum over the micro-batch's weight."""
        x, y, weight = batch
        errors: Tensor = (model(x) - y).square().squeeze(1)
        return (weight * errors).sum()
