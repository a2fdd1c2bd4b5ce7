"""Host numbers of many processes, summed in log2(processes) steps while the main thread runs backward."""

from collections.abc import Sequence
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

# Numbers are sent as limbs of 32 bits each, from 2^-192 up to 2^64, which processes can add in any order: no addition
# rounds, since a double holds the sum of 2^21 limbs exactly
LIMBS, LIMB, FRACTION = 8, 32, 192
MESSAGE_MAXIMA = 3  # the last numbers of a message, of which the maximum is taken, not the sum
TAG = 1  # apart from the other messages of the group, some of which may be under way


class SummedMessage(Thread):
    """Sums `values` over all processes, to the same bits on each; of the last three it takes the maxima.

    Recursive doubling: in each step two processes send one another what they have, and both add it up. It begins when
    the message `before` has ended.
    """

    def __init__(self, values: Sequence[float], group: dist.ProcessGroup | None, before: Thread | None) -> None:
        super().__init__(daemon=True)
        self._values, self._group, self._before = values, group, before
        self._rank, self._processes = dist.get_rank(group), dist.get_world_size(group)
        self._error: BaseException | None = None
        self._rows: list[list[float]] = []
        self.start()

    def rows(self) -> list[list[float]]:
        """Wait, and return one row of sums; if a number does not fit into limbs, the values of all in rank order.

        Raises the error of a process that cannot be reached.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._rows

    def run(self) -> None:
        try:
            if self._before is not None:
                self._before.join()
            misfits, *words = self._sums(_to_words(self._values)).tolist()
            self._rows = self._gathered() if misfits else [_from_words(words)]
        except BaseException as error:  # raised in `rows`
            self._error = error
        self._before = None

    def _sums(self, words: Tensor) -> Tensor:
        """Add up over the largest power of two; each process above it sends to one of these, and gets the sums."""
        rank, power = self._rank, 1 << self._processes.bit_length() - 1
        if rank >= power:
            dist.send(words, rank - power, self._group, TAG)
            return self._received(words, rank - power)
        has_partner = rank + power < self._processes
        if has_partner:
            words = _added(words, self._received(words, rank + power))
        distance = 1
        while distance < power:
            words = _added(words, self._swapped(words, rank ^ distance, rank ^ distance))
            distance *= 2
        if has_partner:
            dist.send(words, rank + power, self._group, TAG)
        return words

    def _gathered(self) -> list[list[float]]:
        """Return the values of all, by log2(processes) messages: each sends on all that was received before."""
        rows, distance = torch.tensor([self._values], dtype=torch.float64), 1
        while distance < self._processes:
            piece = rows[: self._processes - distance]
            ranks = (self._rank - distance) % self._processes, (self._rank + distance) % self._processes
            rows, distance = torch.cat([rows, self._swapped(piece, *ranks)]), 2 * distance
        return rows.roll(self._rank, 0).tolist()

    def _swapped(self, tensor: Tensor, to: int, source: int) -> Tensor:
        sent = dist.isend(tensor, to, self._group, TAG)
        received = self._received(tensor, source)
        assert sent is not None
        sent.wait()
        return received

    def _received(self, like: Tensor, source: int) -> Tensor:
        received = torch.empty_like(like)
        dist.recv(received, source, self._group, TAG)
        return received


def _to_words(values: Sequence[float]) -> Tensor:
    """Return whether the values do not fit into limbs, the limbs of those to sum, and those for the maxima."""
    try:
        limbs = [limb for value in values for limb in to_limbs(value)]
        words = [0.0, *limbs[: -MESSAGE_MAXIMA * LIMBS], *values[-MESSAGE_MAXIMA:]]
    except (OverflowError, ValueError):
        words = [1.0] + [0.0] * (LIMBS * (len(values) - MESSAGE_MAXIMA) + MESSAGE_MAXIMA)
    return torch.tensor(words, dtype=torch.float64)


def _from_words(words: Sequence[float]) -> list[float]:
    limbs = [words[i : i + LIMBS] for i in range(0, len(words) - MESSAGE_MAXIMA, LIMBS)]
    return [*map(from_limbs, limbs), *words[-MESSAGE_MAXIMA:]]


def _added(words: Tensor, others: Tensor) -> Tensor:
    maxima = torch.maximum(words[-MESSAGE_MAXIMA:], others[-MESSAGE_MAXIMA:])
    return torch.cat([words[:-MESSAGE_MAXIMA] + others[:-MESSAGE_MAXIMA], maxima])


def to_limbs(value: float) -> list[float]:
    """Return a number as limbs, the lowest first. Raises ValueError or OverflowError if they cannot hold it exactly."""
    numerator, denominator = value.as_integer_ratio()
    whole, sign = abs(numerator) << FRACTION + 1 - denominator.bit_length(), -1.0 if numerator < 0 else 1.0
    if whole >> LIMB * LIMBS:
        raise OverflowError(f"{value!r} is 2^64 or more.")
    return [sign * (whole >> LIMB * i & 0xFFFFFFFF) for i in range(LIMBS)]


def from_limbs(limbs: Sequence[float]) -> float:
    """Return the number of limbs, or of sums of limbs, rounded once."""
    return sum(int(limb) << LIMB * i for i, limb in enumerate(limbs)) / (1 << FRACTION)
