"""The global data order: for each epoch one sequence of sample indices, the same on every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy

from engine.errors import UserError

Order = Callable[[int], Sequence[int] | Sequence[Sequence[int]]]
"""epoch -> sample indices, or groups of them that stay together: a pure function, the same on all processes, of the
same length in each epoch. Of groups, N, the length of an epoch and a schedule by samples count groups."""


def sequential(samples: int) -> Order:
    """Return the order 0, 1, 2, ... of every epoch."""
    return lambda epoch: range(samples)


def shuffled(samples: int, seed: int) -> Order:
    """Return a fresh permutation for each epoch, a pure function of (seed, epoch): 8 bytes a sample."""

    def order(epoch: int) -> Sequence[int]:
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


def _generator(seed: int, epoch: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.PCG64([seed, epoch]))
