"""Streams of ready micro-batches, and the windows that they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from tests.kit.reference import Regression


class Stream:
    """Yields this process's micro-batches, as lists of sample indices say."""

    def __init__(self, task: Regression, pieces: list[list[int]]) -> None:
        self.task, self.pieces = task, pieces

    def __iter__(self) -> Iterator[Any]:
        for rows in self.pieces:
            yield {"x": self.task.x[rows], "nested": [self.task.y[rows], torch.tensor(rows)]}


class Streamed(Regression):
    def __init__(self, samples: int, pieces: list[list[list[int]]], **options: Any) -> None:
        super().__init__(samples, **options)
        self.pieces = pieces

    def train_data(self) -> Any:
        return Stream(self, self.pieces[dist.get_rank() if dist.is_initialized() else 0])

    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, (batch["x"], *batch["nested"]))


def deal(lengths: list[int], sizes: list[int]) -> list[list[list[int]]]:
    """For each process, `length` micro-batches; sizes cycle, so that they are ragged."""
    pieces, sample, number = [], 0, 0
    for length in lengths:
        pieces.append([])
        for _ in range(length):
            size = sizes[number % len(sizes)]
            pieces[-1].append(list(range(sample, sample + size)))
            sample, number = sample + size, number + 1
    return pieces


def windows_of(pieces: list[list[list[int]]], K: int) -> list[list[int]]:
    """The reference: update u has micro-batches uK to uK+K-1 of every process."""
    longest = max(len(p) for p in pieces)
    return [
        [row for own in pieces for piece in own[start : start + K] for row in piece] for start in range(0, longest, K)
    ]
