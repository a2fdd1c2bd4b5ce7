"""Heartbeats: a thread publishes each process's current activity, so that a hang can be diagnosed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType

from engine.callbacks.base import call
from engine.checkpoint.checkpointer import Checkpointer
from engine.data.lookahead import Lookahead
from engine.data.map_style import MapSource
from engine.training.build import build
from engine.training.validation import Validation
from engine.update.exchange import ACTIVITY_TOPIC, Exchange
from engine.update.updater import Updater
from strategies import Strategy

ACTIVITIES: dict[CodeType, str] = {
    function.__code__: activity
    for function, activity in (
        (MapSource._micros, "fetching {micro}"),
        (Lookahead.take, "reading {micro}"),
        (Updater._forward, "computing {micro}"),
        (Strategy.backward, "in the backward of {micro}"),
        (Exchange.receive, "waiting for the others' message of update {update}"),
        (Updater.finish, "making update {update}"),
        (Validation.run, "validating after update {update}"),
        (Checkpointer.save, "saving update {update}"),
        (Checkpointer.finish, "saving update {update}"),
        (call, "in a callback after update {update}"),
        (build, "starting"),
    )
}
"""The activity of a process whose innermost known function this is."""


class Heartbeat:
    """While it is entered, publishes this process's activity. `progress` returns the update and micro-batches."""

    def __init__(self, strategy: Strategy, progress: Callable[[], tuple[int, int]], seconds: float = 3.0) -> None:
        self._strategy, self._progress, self._seconds = strategy, progress, seconds
        self._main = threading.get_ident()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="tally-heartbeat", daemon=True)
        self._activity, self._since = "", time.time()

    def __enter__(self) -> Heartbeat:
        if self._strategy.processes > 1:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(4.0)  # longer than it waits for a host that is gone

    def _publish(self) -> None:
        while not self._ends.wait(self._seconds):
            activity = self._describe(sys._current_frames().get(self._main))
            if activity != self._activity:
                self._activity, self._since = activity, time.time()
            text = f"{activity} for {time.time() - self._since:.0f} s"
            self._strategy.post(ACTIVITY_TOPIC, f"{time.time()} {text}")

    def _describe(self, frame: FrameType | None) -> str:
        update, micro_batches = self._progress()
        while frame is not None:
            if (activity := ACTIVITIES.get(frame.f_code)) is not None:
                micro = f"micro-batch {micro_batches + 1} of update {update}"
                return activity.format(micro=micro, update=update)
            frame = frame.f_back
        return "between two updates"
