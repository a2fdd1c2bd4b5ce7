"""Is the reduction hidden? What it costs an update, told from the windows that a run makes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

HIDDEN = 0.05
"""A reduction that costs less than this share of an update is called hidden."""


class Costs(NamedTuple):
    """Where the time of one update goes on one process, in seconds."""

    accumulate_grad_batches: int
    """K, with which this was measured."""
    micro_batch: float
    """Forward and backward of a micro-batch that is not synchronised, with its data."""
    reduction: float
    """How much longer the last one takes: what the reduction adds to it, and waiting for other processes."""
    step: float
    """After that: clipping, and the optimizer's step."""

    def update(self, K: int) -> float:
        """Return the seconds of an update with windows of K, where the reduction costs what it cost."""
        return K * self.micro_batch + self.reduction + self.step

    def share(self, K: int) -> float:
        """Return the share of an update that the reduction costs."""
        return self.reduction / self.update(K)

    @property
    def hiding(self) -> int:
        """The least K at which the reduction is hidden."""
        left = self.reduction / HIDDEN - self.reduction - self.step
        return max(1, math.floor(left / self.micro_batch) + 1)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of it."""
        K = self.accumulate_grad_batches
        return {
            "accumulate_grad_batches": K,
            "seconds_per_micro_batch": self.micro_batch,
            "seconds": self.reduction,
            "seconds_of_step": self.step,
            "share_of_update": self.share(K),
            "accumulate_grad_batches_to_hide": self.hiding,
        }

    def __str__(self) -> str:
        """Return one line for people."""
        K, least = self.accumulate_grad_batches, self.hiding
        more = f"; less than {HIDDEN:.0%} at K={least}" if least > K else ""
        return f"the reduction, and waiting for others, cost {self.share(K):.1%} of an update at K={K}{more}"


class Meter:
    """Adds up the clock readings at the boundaries of one process's full windows; of the newest K that is 2 or more.

    The first window of each K does not count: it warms up. Where reading data takes time, the reduction is understated
    by K / (K - 1) micro-batches' reading: K of them lie before the last forward, and K - 1 micro-batches.
    """

    def __init__(self) -> None:
        self._K = self._windows = 0
        self._before = self._last = self._step = 0.0

    def add(self, K: int, began: float, last_began: float, reduced: float, ended: float) -> None:
        """Add a window: when it began, its last micro-batch began, its gradient was there, and its update was made."""
        if K < 2:
            return
        if K != self._K:
            self._K, self._windows = K, -1
            self._before = self._last = self._step = 0.0
        self._windows += 1
        if self._windows:
            self._before += last_began - began
            self._last += reduced - last_began
            self._step += ended - reduced

    @property
    def costs(self) -> Costs | None:
        """The means; None where nothing is known: every window had one micro-batch, or there were none."""
        if self._windows < 1:
            return None
        micro_batch = self._before / self._windows / (self._K - 1)
        reduction = max(0.0, self._last / self._windows - micro_batch)
        return Costs(self._K, micro_batch, reduction, self._step / self._windows)
