"""A changing number of micro-batches per window."""

from __future__ import annotations

from engine.callbacks.base import Callback
from engine.plan.schedule import Unit, check_scheduling


class GradientAccumulationScheduler(Callback):
    """Changes K during the run: `{0: 8, 4: 4, 8: 1}` is K=8 in epochs 0 to 3, 4 in 4 to 7, 1 from epoch 8 on.

    Epochs count from 0. `unit` says what the keys count: "epoch", "update", or "sample" (over all processes, since the
    start; a change by samples comes with the first window that starts there or later). K is 1 until the first key. The
    dictionary is copied, and K is a pure function of the place in the run. Raises ValueError for anything but whole
    numbers, keys of at least 0 and K of at least 1.
    """

    def __init__(self, scheduling: dict[int, int], unit: Unit = "epoch") -> None:
        self.scheduling = check_scheduling(scheduling, unit)
        self.unit: Unit = unit
