"""Experiment trackers with wandb's interface: `init(...)` gives a run with `log(values, step=...)` and `finish()`."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engine.errors import UserError
from engine.loggers.base import Start
from engine.loggers.grouped import GroupedLogger


class TrackerLogger(GroupedLogger):
    """Logs to a tracker. Raises UserError if its module is missing.

    `run` is what its `init` returned, or the name of its module, such as "wandb": process 0 then imports it, and calls
    `init(config=..., **options)` when the run starts. `self.run` is what that returned. A run of wandb with a `run_dir`
    has an id of its own, by which a resumed run continues its history.
    """

    def __init__(self, run: Any, options: Mapping[str, Any] | None = None) -> None:
        if isinstance(run, str) and find_spec(run) is None:
            raise UserError(f"loggers: there is no module {run!r}. Use pip install {run}.")
        self.run = self._given = run
        self._options = options or {}

    def open(self, start: Start) -> None:
        super().open(start)
        if isinstance(self._given, str):
            resumes = self._given == "wandb" and start.run is not None
            own = {"id": start.run, "resume": "allow"} if resumes else {}
            self.run = import_module(self._given).init(config=dict(start.configuration), **{**own, **self._options})

    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        """Log the numbers at the update; a tracker ignores those that come again after a resume."""
        self.run.log(dict(values), step=update)

    def close(self) -> None:
        self.run.finish()
