"""Where the time of updates goes, from a few looks at the clock in each window: as many in a long one as in a short."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from engine.data.window import Window
from engine.update.reduction import Costs
from strategies import MicroBatch

DATA, COMPUTE, STEP = "waiting for data", "forward and backward", "optimizer's step"
REDUCTION = "reduction, and waiting for others"
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples are spread evenly between whole numbers, whichever updates one takes: each n-th, too."""


@dataclass
class Times:
    """What the clock says of full windows of K, in seconds of all of them."""

    K: int
    windows: int = 0
    data: float = 0.0
    """Waiting for the micro-batches."""
    before: float = 0.0
    """From a window's begin to its last micro-batch's forward."""
    last: float = 0.0
    """From there until the gradient is there, and the other processes' message."""
    step: float = 0.0
    """From there until the update is made."""

    @property
    def computing(self) -> float:
        """Forward and backward of a micro-batch that is not the last; K is 2 or more, and there are windows."""
        return max(0.0, self.before - self.data) / self.windows / (self.K - 1)


class Meter:
    """Adds up the times of one process's full windows, by their K; the first of each K apart: it warms up.

    The wait for data is seen for one micro-batch of each window, another one each time, and counts for all K of them.
    `sees_device` says whether the host's clock sees what is computed, `defers` whether only a window's last micro-batch
    is synchronised with other processes.
    """

    def __init__(self, is_alone: bool, sees_device: bool, defers: bool) -> None:
        self._is_alone, self._sees_device = is_alone, sees_device
        self.sees_reduction = defers and sees_device and not is_alone
        """Whether there is a reduction, and windows of K >= 2 tell what it costs."""
        self._first: dict[int, Times] = {}
        self._later: dict[int, Times] = {}
        self._K = 0  # the newest that is 2 or more
        self._wait = 0.0

    def watched(self, window: Window, update: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of `window`, with an eye on one, at a place that follows no rhythm of data."""
        place = int(GOLDEN * update % 1.0 * window.stage.accumulate_grad_batches)
        micros = iter(window)
        return chain(islice(micros, place), self._next_of(micros), micros)

    def _next_of(self, micros: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        asked = time.perf_counter()
        for micro in micros:
            self._wait = time.perf_counter() - asked
            yield micro
            return

    def add(self, K: int, began: float, last_began: float, reduced: float, ended: float) -> None:
        """Add a window: when it began, its last micro-batch began, its gradient was there, and its update was made."""
        if K in self._first:
            times = self._later[K]
        else:
            times, self._later[K] = self._first.setdefault(K, Times(K)), Times(K)
        times.windows += 1
        times.data += K * self._wait
        times.before += last_began - began
        times.last += reduced - last_began
        times.step += ended - reduced
        if K > 1:
            self._K = K

    @property
    def costs(self) -> Costs | None:
        """What an update costs at the newest K of 2 or more; None where it is not known."""
        times = self._later.get(self._K)
        if not self.sees_reduction or times is None or not times.windows:
            return None
        windows, computing = times.windows, times.computing
        reduction = max(0.0, times.last / windows - computing)
        return Costs(times.K, computing + times.data / windows / times.K, reduction, times.step / windows)

    @property
    def spent(self) -> dict[str, float]:
        """The seconds of all full windows by what they went into, as far as the host's clock can tell it."""
        all_times = [*self._first.values(), *self._later.values()]
        data, last, step = (sum(getattr(times, what) for times in all_times) for what in ("data", "last", "step"))
        rest = max(0.0, sum(times.before for times in all_times) + last - data)
        if not self._sees_device:
            return {DATA: data, f"{COMPUTE}, reduction, {STEP}": rest + step}
        if self._is_alone:
            return {DATA: data, COMPUTE: rest, STEP: step}
        known = {K: times.computing for K, times in self._later.items() if K > 1 and times.windows}
        if not self.sees_reduction or not known:
            return {DATA: data, f"{COMPUTE}, {REDUCTION}": rest, STEP: step}
        computing = sum(times.windows * known.get(times.K, [*known.values()][-1]) for times in all_times)
        reduction = min(rest, max(0.0, last - computing))
        return {DATA: data, COMPUTE: rest - reduction, REDUCTION: reduction, STEP: step}
