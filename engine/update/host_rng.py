"""Python's and numpy's generators: a run that goes on draws from them as one that was not interrupted.

Most models never draw from them, and to seed both before each window would cost as much as a small backward. So they
are watched: beside each stands a shadow, seeded like it, and each window begins with one draw from all four. While
they agree nobody else has drawn; from the first window in which they do not, each window is seeded by its number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy

from engine.order import mix

WINDOW_STREAM = 4
"""Sets these draws apart from those of models and data."""

HostState = tuple[bool, int]
"""Whether anything draws, and the update before which generators and shadows were last seeded (-1: they must be)."""


class HostRandomness:
    """The generators of one process, in a run that can be resumed."""

    def __init__(self, seed: int, rank: int) -> None:
        self._place = seed, WINDOW_STREAM, rank
        self._python, self._numpy = random.Random(), numpy.random.RandomState()
        self._draws, self._seeded = False, -1
        self._before = self._draws, self._seeded
        self._stands = False  # whether the shadows stand where the generators did after the window's first draw

    def start_window(self, update: int) -> None:
        """Prepare for the window of an update."""
        self._before = self._draws, self._seeded
        if self._draws or self._seeded < 0:
            self._seed(update)
        elif not (self._stands or self._catch_up(update)) or not self._agree():
            self._draws = True
            self._seed(update)
        self._stands = True

    def forget(self) -> None:
        """Seed before the next window: between two, others may have drawn."""
        self._seeded, self._stands = -1, False

    def drop(self) -> None:
        """Take the window that was begun for one that never was."""
        (self._draws, self._seeded), self._stands = self._before, False

    def state(self) -> HostState:
        """Return what a run that goes on from this boundary needs to know."""
        if self._stands and self._seeded >= 0:
            self._draws = self._draws or self._have_parted()
        return self._draws, self._seeded

    def load_state(self, states: Sequence[HostState], rank: int, P: int) -> None:
        """Take back what all processes returned; on another number of them each window begins anew."""
        same = len(states) == P
        self._draws, self._seeded = states[rank] if same else (any(draws for draws, _ in states), -1)
        self._stands = False

    def _seed(self, update: int) -> None:
        seed = mix(*self._place, update)
        random.seed(seed)
        numpy.random.seed(seed & 0xFFFFFFFF)
        if not self._draws:
            self._python.seed(seed)
            self._numpy.seed(seed & 0xFFFFFFFF)
        self._seeded = update

    def _catch_up(self, update: int) -> bool:
        """Go to where a run that was not interrupted stands after the window before `update`."""
        self._seed(self._seeded)
        return all(self._agree() for _ in range(self._seeded + 1, update))

    def _agree(self) -> bool:
        return random.random() == self._python.random() and numpy.random.random() == self._numpy.random()

    def _have_parted(self) -> bool:
        return random.getstate() != self._python.getstate() or _numbers(numpy.random) != _numbers(self._numpy)


def _numbers(generator: Any) -> tuple[Any, ...]:
    name, keys, *rest = generator.get_state(legacy=True)
    return name, keys.tolist(), rest
