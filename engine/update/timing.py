"""The time of updates by activity, from a few clock reads for each window, however long it is."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from engine.data.window import Window
from strategies import MicroBatch, Strategy

DATA, COMPUTE, STEP = "waiting for data", "forward and backward", "optimizer's step"
REDUCTION = "reduction, and waiting for others"
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples are spread evenly between whole numbers, whichever updates one takes: each n-th, too."""
HIDDEN = 0.05  # a reduction that costs less than this share of an update is called hidden


class ReductionCost(NamedTuple):
    """The time of one update on one process, in seconds, and the K that would hide the reduction."""

    accumulate_grad_batches: int  # K, with which this was measured
    micro_batch: float  # forward and backward of a micro-batch that is not synchronised, with its data
    reduction: float  # the extra time of the last micro-batch: the reduction, and waiting for other processes
    step: float  # the time after that: clipping, and the optimizer's step

    def share(self, K: int) -> float:
        """Return the share of an update that the reduction costs, in windows of K."""
        return self.reduction / (K * self.micro_batch + self.reduction + self.step)

    @property
    def hiding(self) -> int:
        """The smallest K at which the reduction is hidden."""
        left = self.reduction / HIDDEN - self.reduction - self.step
        return max(1, math.floor(left / self.micro_batch) + 1)

    def summary(self) -> dict[str, Any]:
        """Return the entry in summary.json."""
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
        K, least = self.accumulate_grad_batches, self.hiding
        more = f"; K={least} would make it less than {HIDDEN:.0%}" if least > K else ""
        return f"reduction, and waiting for others: {self.share(K):.1%} of an update at K={K}{more}"


@dataclass
class Times:
    """The clock's readings of full windows of K: seconds, summed over all of them."""

    K: int
    windows: int = 0
    data: float = 0.0  # waiting for the micro-batches
    before: float = 0.0  # from a window's start to its last micro-batch's forward
    last: float = 0.0  # from there until the gradient is reduced and the other processes' message has come
    step: float = 0.0  # from there until the update is made

    @property
    def computing(self) -> float:
        """Forward and backward of a micro-batch that is not the last; needs K >= 2 and at least one window."""
        return max(0.0, self.before - self.data) / self.windows / (self.K - 1)


class NoTimer:
    """The timer of runs that need no times: it does nothing."""

    sees_reduction = False
    cost: ReductionCost | None = None
    seconds_by_activity: dict[str, float] = {}  # noqa: RUF012 - always empty

    def watch(self, window: Window, update: int) -> Iterable[MicroBatch]:
        """Begin a window; return its micro-batches."""
        return window

    def last_micro_batch(self) -> None:
        """Note that the forward of the last micro-batch begins."""

    def reduced(self) -> None:
        """Note that the gradient is reduced."""

    def end(self, window: Window, micro_batches: int) -> None:
        """Add a window whose update is made, if it was full."""


NO_TIMER = NoTimer()


class UpdateTimer(NoTimer):
    """Adds up the times of full windows by K, the first of each apart: it warms up. One wait counts for all K."""

    def __init__(self, strategy: Strategy) -> None:
        self._is_alone = strategy.processes == 1
        self._sees_device = strategy.device.type == "cpu"  # whether the host's clock sees what is computed
        is_deferred = strategy.defers_reduction and strategy.micro_batches is None and strategy.data_parallel_size > 1
        self.sees_reduction = is_deferred and self._sees_device and not self._is_alone
        """Whether there is a reduction, and windows of K >= 2 show its cost."""
        self._first: dict[int, Times] = {}
        self._later: dict[int, Times] = {}
        self._newest_K = 0  # of those that are 2 or more
        self._began = self._last_began = self._reduced = self._wait = 0.0

    def watch(self, window: Window, update: int) -> Iterable[MicroBatch]:
        self._began = self._last_began = time.perf_counter()
        if window.is_empty:
            return window
        # one wait is timed, at an index that follows no rhythm
        index = int(GOLDEN * update % 1.0 * window.stage.accumulate_grad_batches)
        micros = window.micros
        return chain(islice(micros, index), self._next_of(micros), micros)

    def last_micro_batch(self) -> None:
        if self.sees_reduction:
            self._last_began = time.perf_counter()

    def reduced(self) -> None:
        self._reduced = time.perf_counter()

    def end(self, window: Window, micro_batches: int) -> None:
        K = window.stage.accumulate_grad_batches
        if micro_batches != K:
            return
        if K in self._first:
            times = self._later[K]
        else:
            times, self._later[K] = self._first.setdefault(K, Times(K)), Times(K)
        times.windows += 1
        times.data += K * self._wait
        times.before += self._last_began - self._began
        times.last += self._reduced - self._last_began
        times.step += time.perf_counter() - self._reduced
        if K > 1:
            self._newest_K = K

    @property
    def cost(self) -> ReductionCost | None:  # type: ignore[override]
        """The cost of an update at the newest K of 2 or more; None if it is unknown."""
        times = self._later.get(self._newest_K)
        if not self.sees_reduction or times is None or not times.windows:
            return None
        windows, computing = times.windows, times.computing
        reduction = max(0.0, times.last / windows - computing)
        return ReductionCost(times.K, computing + times.data / windows / times.K, reduction, times.step / windows)

    @property
    def seconds_by_activity(self) -> dict[str, float]:  # type: ignore[override]
        """The seconds of all full windows by activity, as far as the host's clock can tell them apart."""
        all_times = [*self._first.values(), *self._later.values()]
        data, last, step = (sum(getattr(times, name) for times in all_times) for name in ("data", "last", "step"))
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

    def _next_of(self, micros: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        asked = time.perf_counter()
        for micro in micros:
            self._wait = time.perf_counter() - asked
            yield micro
            return
