"""The pace of a run: its rates, the time left, and the process that slows it down."""

from collections import deque
from datetime import timedelta
from typing import NamedTuple

from engine.callbacks.base import Trainer


class _Point(NamedTuple):
    """The totals of a run at one time."""

    time: float
    update: int
    samples: int
    weight: float


class Pace:
    """Samples the totals of a run, and measures its last `seconds` since `restart`."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._points: deque[_Point] = deque()

    def restart(self, trainer: Trainer, now: float) -> None:
        """Measure from now on: the time before was not training."""
        self._points.clear()
        self.see(trainer, now)

    def see(self, trainer: Trainer, now: float) -> None:
        """Sample the totals of a run."""
        points = self._points
        points.append(_Point(now, trainer.update, trainer.samples, trainer.weight))
        while len(points) > 2 and points[1].time < now - self._seconds:
            points.popleft()

    def rates(self) -> tuple[float, float]:
        """Return (samples, weight) a second, over all processes; 0 if unknown."""
        first, last = self._points[0], self._points[-1]
        seconds = last.time - first.time
        if not seconds:
            return 0.0, 0.0
        return (last.samples - first.samples) / seconds, (last.weight - first.weight) / seconds

    def left(self, trainer: Trainer) -> timedelta | None:
        """Return the time to the end, validations aside; None if it is unknown."""
        rate, _ = self.rates()
        ends = []
        if trainer.plan is not None and trainer.settings.max_epochs is not None:
            ends.append(trainer.settings.max_epochs * trainer.plan.samples - trainer.samples)
        if trainer.settings.max_updates is not None:
            stage = trainer.schedule.at(trainer.epoch, trainer.update, trainer.samples)
            ends.append((trainer.settings.max_updates - trainer.update) * stage.effective_batch)
        return timedelta(seconds=round(min(ends) / rate)) if ends and rate else None

    def slow_process(self, trainer: Trainer) -> str:
        """Name the process for whose data and compute the others wait over a tenth of the time, or return ""."""
        first, last, slowest = self._points[0], self._points[-1], trainer.slowest
        waiting = (slowest.seconds - slowest.others) * (last.update - first.update) if slowest else 0.0
        if slowest is None or waiting <= 0.1 * (last.time - first.time):
            return ""
        own, others = 1000 * slowest.seconds, 1000 * slowest.others
        return f"process {slowest.process} is slow: {own:,.0f} ms of its own per update, the others {others:,.0f}"
