"""The global data order: for each epoch one sequence of sample indices, the same on every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy

Order = Callable[[int], Sequence[int]]
"""epoch -> sample indices: a pure function, the same on all processes, of the same length in each epoch."""


def sequential(samples: int) -> Order:
    """Return the order 0, 1, 2, ... of every epoch."""
    return lambda epoch: range(samples)


def shuffled(samples: int, seed: int) -> Order:
    """Return a fresh permutation for each epoch, a pure function of (seed, epoch): 8 bytes a sample."""

    def order(epoch: int) -> Sequence[int]:
        permutation = numpy.random.Generator(numpy.random.PCG64([seed, epoch])).permutation(samples)
        return memoryview(permutation.data)  # indexes and slices like a list, without one Python int a sample

    return order


def mix(*numbers: int) -> int:
    """Return a 64-bit hash of whole numbers, for seeds: each bit depends on all of them (the CPU generator uses 32).

    The finaliser is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
