"""Is the reduction hidden? What it costs an update, and which K would hide it."""

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
