"""The cases of an audit, and the job that an adapter is given in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine.conformance.reference import Regression, deal, in_order, network, windows_of

N, EPOCHS = 4, 2
CASES = (
    "even", "short last window", "ragged last micro-batch", "padded tokens", "weight 0", "uneven processes",
    "K by schedule", "resume", "another P",
)  # fmt: skip
"""The cases by name. An adapter declares the last three, since they ask more of it than K."""
_, SHORT, RAGGED, PADDED, ZERO, UNEVEN, SCHEDULE, RESUME, ANOTHER_P = CASES


@dataclass(frozen=True)
class Adapter:
    """A trainer under audit: `train(job)` trains `job.model` on one process, in the `cases` that it claims to support.

    `make()` returns the model. It maps (n, 5) to (n, 1), treats each sample alone and draws nothing.
    """

    train: Callable[[Job], object]
    make: Callable[[], nn.Module] = network
    cases: Sequence[str] = CASES[:6]


class Planned(NamedTuple):
    """An update as it should be: its epoch, K, samples over all processes, and whether it has K micro-batches."""

    epoch: int
    K: int
    samples: int
    is_full: bool


class Case:
    """A case on P processes: the rows of each process's micro-batches, and the number of samples of the dataset.

    K is not a multiple of P, so that no two factors are the same number. `then_K` is that of the second epoch or run,
    `then_P` the P of the second run, if there is one.
    """

    def __init__(self, name: str, P: int, dtype: torch.dtype) -> None:
        self.name, self.P = name, P
        self.K = K = 4 if P == 3 else 3
        sizes = [N] * (P * (2 * K - (name == SHORT)))
        if name == RAGGED:
            sizes[-P:] = [N // 2] * P
        micro_batches = deal([len(sizes)], sizes)[0]
        self.pieces, self.samples = [micro_batches[rank::P] for rank in range(P)], sum(sizes)
        self.task = task = Regression(self.samples)
        task.x, task.y = task.x.to(dtype).double(), task.y.to(dtype).double()
        if name == PADDED:
            task.weight = torch.randint(0, 4, (self.samples,), generator=torch.Generator().manual_seed(1)).double()
        elif name == ZERO:
            task.weight[P * N : 2 * P * N] = 0  # the second micro-batch of each process
        elif name == UNEVEN:
            del self.pieces[-1][-2:]
            self.samples -= 1
        self.then_P = {RESUME: P, ANOTHER_P: 1 if P > 1 else 3}.get(name)
        self.then_K = P * K // self.then_P if self.then_P else 2

    def planned(self, from_dataset: bool) -> list[Planned]:
        """Return the updates of the whole run."""
        updates: list[Planned] = []
        for epoch in range(EPOCHS):
            K = self.then_K if epoch and self.name == SCHEDULE else self.K
            dataset, given = in_order(self.samples, self.P * N * K), windows_of(self.pieces, K)
            for number, rows in enumerate(dataset if from_dataset else given, 1):
                own_K = self.then_K if updates and self.name == ANOTHER_P else K
                updates.append(Planned(epoch, own_K, len(rows), number * K <= len(self.pieces[0])))
        return updates


class Job:
    """One run on one process: a model, and data as ready micro-batches or as the dataset of all processes.

    A batch or sample is (x, y, weight): (n, 5), (n, 1), and (n,) valid tokens. `schedule` is K by epoch. `folder` is
    for checkpoints: save there and return after `stop_after` updates, and resume from it if `resumes`.
    """

    N, epochs, from_dataset = N, EPOCHS, False

    def __init__(self, case: Case, model: nn.Module, rank: int, dtype: torch.dtype, folder: str, resumes: bool) -> None:
        self.model, self.rank, self.folder, self.resumes = model, rank, folder, resumes
        self.P, self.K = (case.then_P or case.P, case.then_K) if resumes else (case.P, case.K)
        self.schedule = {0: self.K, 1: case.then_K} if case.name == SCHEDULE else {0: self.K}
        self.stop_after = 1 if case.then_P and not resumes else None
        self._tensors = [values.to(dtype) for values in (case.task.x, case.task.y, case.task.weight)]
        self._total = case.task.total
        in_order = [rows for same in zip(*case.pieces, strict=False) for rows in same]
        self._pieces = case.pieces[rank] if self.P == case.P else in_order[rank :: self.P]
        self._samples = case.samples

    @property
    def micro_batches(self) -> list[tuple[Tensor, ...]]:
        """This process's micro-batches of each epoch."""
        return [tuple(values[list(rows)] for values in self._tensors) for rows in self._pieces]

    @property
    def dataset(self) -> TensorDataset:
        """The samples of all processes, for a trainer that shares them out in micro-batches of N."""
        self.from_dataset = True
        return TensorDataset(*(values[: self._samples] for values in self._tensors))

    def loss(self, model: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return the mean over the micro-batch's weight. It is NaN if the weight is 0, as torch's own losses are."""
        return self.loss_sum(model, batch) / batch[2].sum()

    def loss_sum(self, model: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return the sum over the micro-batch's weight."""
        return self._total(model, batch)
