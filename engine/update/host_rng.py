"""Python's and numpy's generators: a resumed run draws from them what the uninterrupted run would have drawn.

Most models never draw from them, and seeding both before each window costs as much as a small backward. So each
generator has a shadow with the same seed, and each window begins with one draw from all four. While they agree, nobody
else has drawn. From the first window in which they differ, each window is seeded by its number. A checkpoint then holds
two numbers per process, where the generators' states would be 5 kB.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy

from engine.seeds import WINDOW_STREAM, mix, seed_host

HostState = tuple[bool, int]
"""Whether anything draws, and the update before which generators and shadows were last seeded (-1: they must be)."""


class HostRng:
    """The host's generators of one process, in a run that can be resumed."""

    def __init__(self, seed: int, rank: int) -> None:
        self._key = seed, WINDOW_STREAM, rank
        self._python, self._numpy = random.Random(), numpy.random.RandomState()
        self._draws, self._seeded = False, -1
        self._before = self._seeded
        self._is_ready = False  # whether the shadows stand where the generators did after the window's first draw

    def start_window(self, update: int) -> None:
        """Prepare for the window of an update."""
        self._before = self._seeded
        if self._draws or self._seeded < 0:
            self._seed(update)
        elif not (self._is_ready or self._catch_up(update)) or not self._agree():
            self._draws = True
            self._seed(update)
        self._is_ready = True

    def forget(self) -> None:
        """Seed before the next window: others may have drawn since the last one."""
        self._seeded, self._is_ready = -1, False

    def drop(self) -> None:
        """Undo `start_window`, but for draws of windows before that it has found: the window was dropped."""
        self._seeded, self._is_ready = self._before, False

    def state(self) -> HostState:
        """Return what a run that resumes from this boundary needs."""
        if self._is_ready and self._seeded >= 0:
            self._draws = self._draws or self._have_parted()
        return self._draws, self._seeded

    def load_state(self, states: Sequence[HostState], rank: int, P: int) -> None:
        """Load what all processes returned; on another number of processes the next window is seeded again."""
        same = len(states) == P
        self._draws, self._seeded = states[rank] if same else (any(draws for draws, _ in states), -1)
        self._is_ready = False

    def _seed(self, update: int) -> None:
        seed = mix(*self._key, update)
        seed_host(seed)
        if not self._draws:
            self._python.seed(seed)
            self._numpy.seed(seed & 0xFFFFFFFF)
        self._seeded = update

    def _catch_up(self, update: int) -> bool:
        """Advance to where an uninterrupted run stands after the window before `update`."""
        self._seed(self._seeded)
        return all(self._agree() for _ in range(self._seeded + 1, update))

    def _agree(self) -> bool:
        return random.random() == self._python.random() and numpy.random.random() == self._numpy.random()

    def _have_parted(self) -> bool:
        return random.getstate() != self._python.getstate() or _numbers(numpy.random) != _numbers(self._numpy)


def _numbers(generator: Any) -> tuple[Any, ...]:
    name, keys, *rest = generator.get_state(legacy=True)
    return name, keys.tolist(), rest
