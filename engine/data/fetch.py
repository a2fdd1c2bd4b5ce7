"""Fetching the samples of one micro-batch, with random draws that depend on its place and nothing else."""

from collections.abc import Callable
from itertools import count, repeat
from operator import getitem, length_hint
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from engine.collate import collated
from engine.data.generators import restore, saved, seed_all
from engine.errors import UserError, describe
from engine.seeds import FETCH_STREAM, ODD, SEED_BITS, mix

Piece = tuple[int, int, list[int]]
"""One micro-batch to fetch: its epoch, the position of its first sample in that epoch's order, and its indices."""


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
        self._collates_all = collate is collated
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
        epoch, start, indices = piece
        self._seed_all(epoch, start)
        if self._fetches_pieces:
            samples = self._dataset.__getitems__(indices)
            if self._collates_all and len(samples) != len(indices):
                raise UserError(
                    f"the dataset's __getitems__ returned {len(samples)} samples for {len(indices)} indices. "
                    "Return one for each; a task's own collate() may leave some out."
                )
            return self._collate(samples)
        left = iter(indices)
        try:
            if self._seeds_each:
                samples = [*map(self._seeded, repeat(epoch), count(start), left)]
            else:
                samples = [*map(getitem, repeat(self._dataset), left)]
        except (IndexError, KeyError) as error:
            index = indices[-1 - length_hint(left)]
            if isinstance(error, KeyError) and error.args != (index,):
                raise  # not for want of this sample
            raise self._has_no(index, error) from error
        if len(samples) < len(indices):  # StopIteration ended `map`
            raise self._has_no(indices[len(samples)], StopIteration("raise another error"))
        return self._collate(samples)

    def _has_no(self, index: int, error: Exception) -> UserError:
        return UserError(f"len(dataset) is {len(self._dataset)}, but its sample {index} raised {describe(error)}")

    def _seeded(self, epoch: int, place: int, index: int) -> Any:
        self._seed_all(epoch, place)
        return self._dataset[index]

    def _seed_all(self, epoch: int, place: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._epoch_seed = epoch, mix(self._seed, FETCH_STREAM, epoch)
        seed_all(self._epoch_seed + place * ODD & SEED_BITS)


class TensorFetch(Dataset[Any]):
    """Fetches pieces of a TensorDataset, each tensor at once: nothing to draw, nothing to collate."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __getitems__(self, piece: Piece) -> list[torch.Tensor]:
        indices = torch.tensor(piece[2])
        return [tensor[indices] for tensor in self._tensors]
