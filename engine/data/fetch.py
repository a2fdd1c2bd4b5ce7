"""Fetching the samples of one micro-batch, with random draws that depend on the sample's place and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from engine.errors import UserError
from engine.seeds import mix
from engine.task import Batching

FETCH_STREAM = 1
"""Sets the draws of a fetch apart from those of the model."""


class Piece(NamedTuple):
    """One micro-batch to fetch: the samples `indices`, which stand in the order of `epoch` from position `start` on."""

    epoch: int
    start: int
    indices: list[int]


class Fetch(Dataset[Any]):
    """Fetches pieces of any map-style dataset.

    torch's, Python's and numpy's generators are seeded from (seed, epoch, position) before each sample, or before each
    piece where the dataset fetches whole pieces (`__getitems__`), and restored after: random augmentation does not
    depend on P, workers or what was fetched before, nor does what `collate` draws.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate
        self._seed = seed
        self._collates_all = getattr(collate, "__func__", None) is Batching.collate
        self._fetches_pieces = callable(getattr(dataset, "__getitems__", None))

    def __getitems__(self, piece: Piece) -> Any:
        with _generators_restored():
            if self._fetches_pieces:
                self._seed_all(piece.epoch, piece.start)
                samples = self._dataset.__getitems__(piece.indices)
                if self._collates_all and len(samples) != len(piece.indices):
                    raise UserError(
                        f"the dataset's __getitems__ returned {len(samples)} samples for {len(piece.indices)} indices. "
                        "Return one for each; a task's own collate() may leave some out."
                    )
                return self._collate(samples)
            places = enumerate(piece.indices, piece.start)
            return self._collate([self._sample(piece.epoch, place, index) for place, index in places])

    def _sample(self, epoch: int, place: int, index: int) -> Any:
        self._seed_all(epoch, place)
        try:
            return self._dataset[index]
        except (IndexError, KeyError) as error:
            if isinstance(error, KeyError) and error.args != (index,):
                raise  # not for want of this sample
            raise UserError(
                f"the dataset says that it has {len(self._dataset)} samples, but sample {index} raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _seed_all(self, epoch: int, place: int) -> None:
        seed = mix(self._seed, FETCH_STREAM, epoch, place)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed & 0xFFFFFFFF)


class TensorFetch(Dataset[Any]):
    """Fetches pieces of a TensorDataset, each tensor at once: nothing to draw, nothing to collate."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __getitems__(self, piece: Piece) -> list[torch.Tensor]:
        indices = torch.tensor(piece.indices)
        return [tensor[indices] for tensor in self._tensors]


@contextmanager
def _generators_restored() -> Iterator[None]:
    if get_worker_info() is not None:  # a worker's generators serve nobody else
        yield
        return
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])
