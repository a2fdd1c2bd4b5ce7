"""Loaders resumed in the middle of an epoch: to the sample, on one and two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.kit.resuming import SAMPLES, K, N, resumed

ROWS = [{"id": number} for number in range(SAMPLES)]


class Buckets:
    """A batch sampler: this process's share of the batches, in another order in each epoch."""

    def __init__(self, rank: int, P: int) -> None:
        self.rank, self.P, self.epoch = rank, P, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES // N, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for batch in order[self.rank :: self.P]:
            yield list(range(batch * N, batch * N + N))

    def __len__(self) -> int:
        return SAMPLES // N // self.P


class Stream(IterableDataset[Any]):
    """Ready micro-batches, or samples: this process's share, and of that this worker's."""

    def __init__(self, rank: int, P: int, size: int) -> None:
        self.rank, self.P, self.size, self.epoch = rank, P, size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        starts = [(start + 16 * self.epoch) % SAMPLES for start in range(0, SAMPLES, self.size)]
        starts = starts[self.rank :: self.P][worker::workers]
        for start in starts:
            yield {"id": torch.arange(start, start + self.size) if self.size > 1 else start}


KINDS = {
    "batch_sampler": lambda rank, P: DataLoader(ROWS, batch_sampler=Buckets(rank, P)),  # type: ignore[arg-type]
    "ready micro-batches": lambda rank, P: DataLoader(Stream(rank, P, N), batch_size=None),
    "samples, 2 workers": lambda rank, P: DataLoader(Stream(rank, P, 1), batch_size=N, num_workers=2),
}


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_of_ones_own_resumes_at_its_sample(kind: str, P: int, tmp_path: Path) -> None:
    whole, rest = resumed(KINDS[kind], P, tmp_path / "run")
    assert rest == whole
    updates = SAMPLES // (K * N * P)
    last = [sample for samples in whole for update in samples[-updates:] for sample in update]
    assert sorted(last) == list(range(SAMPLES))  # each sample once
    assert kind == "batch_sampler" or whole[0][-updates][0] == 16 * 2  # the epoch's own order
