"""Python's and numpy's generators: a resumed run draws from them what the uninterrupted run would have drawn.

Most models never draw from them, and seeding both before each window costs as much as a small backward. So they stay as
they were seeded at first, while nobody draws. From the first window before which they have changed, each window is
seeded by its number. A checkpoint then holds two numbers per process, where the generators' states would be 5 kB.
"""

from collections.abc import Sequence
from typing import Any

from engine.data.generators import saved
from engine.seeds import WINDOW_STREAM, mix, seed_host

HostState = tuple[bool, int]
"""Whether anything draws, and the update before which the generators were last seeded (-1: they must be)."""


class HostRng:
    """The host's generators of one process, in a run that can be resumed."""

    def __init__(self, seed: int, rank: int) -> None:
        self._key = seed, WINDOW_STREAM, rank
        self._draws, self._seeded = False, -1
        self._before = self._seeded
        self._start: Any = None  # their state when they were last seeded; None if others may have drawn since

    def start_window(self, update: int) -> None:
        """Prepare for the window of an update."""
        self._before = self._seeded
        self._draws = self._draws or self._have_changed()
        if self._draws or self._seeded < 0:
            self._seed(update)
        elif self._start is None:
            self._seed(self._seeded)

    def forget(self) -> None:
        """Before the next window, seed as the last time: others may draw until then."""
        self._draws, self._start = self.state()[0], None

    def drop(self) -> None:
        """Undo `start_window`, but for draws of windows before that it has found: the window was dropped."""
        self._seeded, self._start = self._before, None

    def state(self) -> HostState:
        """Return what a run that resumes from this boundary needs."""
        self._draws = self._draws or self._have_changed()
        return self._draws, self._seeded

    def load_state(self, states: Sequence[HostState], rank: int, P: int) -> None:
        """Load what all processes returned; on another number of processes the next window is seeded again."""
        same = len(states) == P
        self._draws, self._seeded = states[rank] if same else (any(draws for draws, _ in states), -1)
        self._start = None

    def _have_changed(self) -> bool:
        return self._start is not None and saved() != self._start

    def _seed(self, update: int) -> None:
        seed_host(mix(*self._key, update))
        self._seeded, self._start = update, saved()
