"""Fetching the samples of one micro-batch, with random draws that depend on its place and nothing else."""

from collections.abc import Callable
from itertools import count, repeat
from operator import getitem, length_hint
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from engine.data.generators import restore, saved, seed_all
from engine.errors import UserError, describe
from engine.seeds import FETCH_STREAM, mix
from engine.task import Batching


class Piece(NamedTuple):
    """One micro-batch to fetch: the samples `indices`, which stand in the order of `epoch` from position `start` on."""

    epoch: int
    start: int
    indices: list[int]


class Fetch(Dataset[Any]):
    """Fetches pieces of any map-style dataset, each index once.

    torch's, Python's and numpy's generators are seeded before each piece from (seed, epoch, position): random
    augmentation depends on N, but not on P, K, workers or what was fetched before, nor does what `collate` draws. The
    host's are restored after. `seeds_each` seeds before each sample, for pieces that P cuts.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any], seeds_each: bool = False) -> None:
        self._dataset, self._collate = dataset, collate
        self._seed, self._seeds_each = seed, seeds_each
        self._epoch, self._epoch_seed = -1, 0
        self._collates_all = getattr(collate, "__func__", None) is Batching.collate
        self._fetches_pieces = callable(getattr(dataset, "__getitems__", None))

    def __getitems__(self, piece: Piece) -> Any:
        if get_worker_info() is not None:  # a worker's generators serve nobody else
            return self._fetch(piece)
        before = saved()
        try:
            return self._fetch(piece)
        finally:
            restore(*before)

    def _fetch(self, piece: Piece) -> Any:
        self._seed_all(piece.epoch, piece.start)
        if self._fetches_pieces:
            samples = self._dataset.__getitems__(piece.indices)
            if self._collates_all and len(samples) != len(piece.indices):
                raise UserError(
                    f"the dataset's __getitems__ returned {len(samples)} samples for {len(piece.indices)} indices. "
                    "Return one for each; a task's own collate() may leave some out."
                )
            return self._collate(samples)
        left = iter(piece.indices)
        try:
            if self._seeds_each:
                samples = [*map(self._seeded, repeat(piece.epoch), count(piece.start), left)]
            else:
                samples = [*map(getitem, repeat(self._dataset), left)]
        except (IndexError, KeyError) as error:
            index = piece.indices[-1 - length_hint(left)]
            if isinstance(error, KeyError) and error.args != (index,):
                raise  # not for want of this sample
            raise self._has_no(index, error) from error
        if len(samples) < len(piece.indices):  # as far as `map` came
            raise self._has_no(piece.indices[len(samples)], StopIteration("use another error"))
        return self._collate(samples)

    def _has_no(self, index: int, error: Exception) -> UserError:
        what = f"the dataset says that it has {len(self._dataset)} samples, but sample {index} raised"
        return UserError(f"{what} {describe(error)}")

    def _seeded(self, epoch: int, place: int, index: int) -> Any:
        self._seed_all(epoch, place)
        return self._dataset[index]

    def _seed_all(self, epoch: int, place: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._epoch_seed = epoch, mix(self._seed, FETCH_STREAM, epoch)
        seed_all(mix(place, start=self._epoch_seed))


class TensorFetch(Dataset[Any]):
    """Fetches pieces of a TensorDataset, each tensor at once: nothing to draw, nothing to collate."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __getitems__(self, piece: Piece) -> list[torch.Tensor]:
        indices = torch.tensor(piece.indices)
        return [tensor[indices] for tensor in self._tensors]
