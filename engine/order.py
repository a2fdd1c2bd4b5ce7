"""The global data order: for each epoch one sequence of sample indices, the same on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import numpy
from numpy.typing import NDArray

from engine.errors import UserError

Order = Callable[[int], Sequence[int] | Sequence[Sequence[int]]]
"""epoch -> sample indices, or groups of them that stay together: a pure function, the same on all processes, of the
same length in each epoch. Of groups, N, the length of an epoch and a schedule by samples count groups."""


def sequential(samples: int) -> Order:
    """Return the order 0, 1, 2, ... of every epoch."""
    return lambda epoch: range(samples)


LARGEST_PERMUTATION = 1 << 24
"""The most samples whose permutation is kept in memory, at 8 bytes a sample. That of more is computed as it is read."""
SLICE = 4096  # places of a `KeyedPermutation` that are computed together: few enough for a processor's cache
_ROUNDS = 6
_U = numpy.uint64


def shuffled(samples: int, seed: int) -> Order:
    """Return a fresh permutation for each epoch, a pure function of (seed, epoch).

    Up to `LARGEST_PERMUTATION` samples it takes 8 bytes a sample; above, it is a `KeyedPermutation` and takes none.
    """

    def order(epoch: int) -> Sequence[int]:
        if samples > LARGEST_PERMUTATION:
            return KeyedPermutation(samples, seed, epoch)
        permutation = _generator(seed, epoch).permutation(samples)
        return permutation.data  # indexes and slices like a list, without one Python int a sample

    return order


def bucketed(lengths: Sequence[int], bucket: int, seed: int) -> Order:
    """Return an order in which neighbours have similar length: each `bucket` samples of a shuffled order are sorted.

    `lengths` has one number for each sample; a bucket of some effective batches keeps most of the randomness.
    """
    sizes = numpy.asarray(lengths)

    def order(epoch: int) -> Sequence[int]:
        permutation = _generator(seed, epoch).permutation(len(sizes))
        buckets = [permutation[start : start + bucket] for start in range(0, len(sizes), bucket)]
        return numpy.concatenate([b[numpy.argsort(sizes[b], kind="stable")] for b in buckets]).data

    return order


def within_budget(lengths: Sequence[int], budget: int, seed: int) -> Order:
    """Return an order of groups, each a micro-batch for `micro_batch_size=1`: padded, none holds more than `budget`.

    Samples of similar length are grouped once, until (longest x number) would pass the budget; an epoch shuffles the
    groups. Raises UserError if one sample alone is longer than the budget.
    """
    groups: list[list[int]] = [[]]
    for index in numpy.argsort(numpy.asarray(lengths), kind="stable").tolist():
        if lengths[index] > budget:
            raise UserError(f"sample {index} has length {lengths[index]}, more than the budget of {budget}.")
        if (len(groups[-1]) + 1) * lengths[index] > budget:
            groups.append([])
        groups[-1].append(index)

    def order(epoch: int) -> Sequence[Sequence[int]]:
        return [groups[group] for group in _generator(seed, epoch).permutation(len(groups))]

    return order


class KeyedPermutation(Sequence[int]):
    """A permutation of `samples` indices, keyed by (seed, epoch), that is computed where it is read.

    A balanced Feistel network permutes the numbers of an even number of bits. A number that is not an index is permuted
    again until it is one (cycle-walking): Black and Rogaway, "Ciphers with arbitrary finite domains", 2002. Its round
    function is the finaliser of SplitMix64: a product and a sum modulo 2^b would keep the parity of indices.
    """

    def __init__(self, samples: int, seed: int, epoch: int) -> None:
        self._samples = int(samples)
        self._half = max((self._samples - 1).bit_length() + 1, 2) // 2
        self._keys = _generator(seed, epoch).integers(0, 1 << 64, _ROUNDS, numpy.uint64)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self._at(numpy.arange(*place.indices(self._samples))).data
        return int(self._at(numpy.array([range(self._samples)[place]]))[0])  # range checks it

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._samples, SLICE):
            yield from self[start : start + SLICE]

    def read(self, pieces: Iterable[tuple[int, int, Any]]) -> Iterator[tuple[int, list[int]]]:
        """Yield (start, indices) of each piece (start, stop, ...). Small ones are computed together."""
        places = 0

        def number(piece: tuple[int, int, Any]) -> int:
            nonlocal places
            places += piece[1] - piece[0]
            return places // SLICE

        for _, together in groupby(pieces, number):
            waiting = [range(start, stop) for start, stop, _ in together]
            indices = iter(self._at(numpy.concatenate([numpy.arange(p.start, p.stop) for p in waiting])).tolist())
            yield from ((piece.start, [*islice(indices, len(piece))]) for piece in waiting)

    def _at(self, places: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        found = numpy.empty_like(places)
        for start in range(0, len(places), SLICE):
            numbers = self._permuted(places[start : start + SLICE].astype(numpy.uint64))
            while (outside := numpy.flatnonzero(numbers >= self._samples)).size:
                numbers[outside] = self._permuted(numbers[outside])
            found[start : start + SLICE] = numbers
        return found

    def _permuted(self, numbers: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
        half, low = numpy.uint64(self._half), numpy.uint64((1 << self._half) - 1)
        left, right = numbers >> half, numbers & low
        for key in self._keys:
            left, right = right, left ^ (_splitmix(right ^ key) & low)
        return (left << half) | right


def _splitmix(state: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    state = (state ^ (state >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> _U(27))) * _U(0x94D049BB133111EB)
    return state ^ (state >> _U(31))


def _generator(seed: int, epoch: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.PCG64([seed, epoch]))
