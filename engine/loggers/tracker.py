"""Experiment trackers with wandb's interface: `init(...)` gives a run with `log(values, step=...)` and `finish()`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from engine.loggers.base import Start
from engine.loggers.grouped import GroupedLogger


class TrackerLogger(GroupedLogger):
    """Logs to a tracker.

    Args:
        run: what its `init` returned, or the name of its module, such as "wandb": process 0 then imports it, and calls
            `init(config=..., **options)` when the run starts.
        options: for `init`: a project; an `id` with `resume="allow"` if a resumed run is to continue its history.
    """

    def __init__(self, run: Any, options: Mapping[str, Any] | None = None) -> None:
        self._given = run
        self._options = options or {}

    def open(self, start: Start) -> None:
        super().open(start)
        self._run = self._given
        if isinstance(self._given, str):
            self._run = import_module(self._given).init(**{"config": dict(start.configuration), **self._options})

    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        """Log the numbers at the update; a tracker ignores those that come again after a resume."""
        self._run.log(dict(values), step=update)

    def close(self) -> None:
        self._run.finish()
