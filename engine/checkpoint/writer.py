"""Where and how checkpoints are written: in the background, on process 0, the last few and the best kept."""

from __future__ import annotations

import logging
import math
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import files

log = logging.getLogger("tally")

BEST = "best"
"""The pointer to the best checkpoint: its name, and the metric's value."""


class Best:
    """Which of two validations is better: `"min:loss"` or `"max:accuracy"`."""

    def __init__(self, rule: str, asked_by: str = "keep_best") -> None:
        self._asked_by = asked_by
        self.mode, _, self.metric = str(rule).partition(":")
        if self.mode not in ("min", "max") or not self.metric:
            raise ValueError(f"{asked_by}={rule!r}: give min:METRIC or max:METRIC, as in max:accuracy.")

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric that decides. Raises ValueError where it is missing."""
        if self.metric not in metrics:
            raise ValueError(f"{self._asked_by}={self.mode}:{self.metric}: evaluate() returns {', '.join(metrics)}.")
        return float(metrics[self.metric])

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far. NaN is not."""
        return not math.isnan(value) and (best is None or (value < best if self.mode == "min" else value > best))


class Saver:
    """Writes checkpoints into `folder`, one at a time. A save that fails is told of loudly; training goes on."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._writing: threading.Thread | None = None
        self.error: Exception | None = None
        """What the last save failed with, if it did."""
        self.best: float | None = None
        """The metric of the best checkpoint, once that is there."""
        self.last: Path | None = next(iter(files.candidates(folder)), None)
        """The newest whole checkpoint."""
        self.saves = 0
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_parts(folder)
        probe = folder / f".{uuid.uuid4().hex}.part"
        probe.write_bytes(os.urandom(4096))  # a full or read-only disk is found now
        probe.unlink()

    @property
    def is_busy(self) -> bool:
        """Whether the save before is still being written."""
        return self._writing is not None and self._writing.is_alive()

    def save(self, update: int, model: Mapping[str, Any], state: Mapping[str, Any], best: float | None = None) -> None:
        """Start writing a checkpoint, of metric `best` if it is the best; wait first for the one before."""
        self.wait()
        self._writing = threading.Thread(target=self._write, args=(update, model, state, best), name="tally-save")
        self._writing.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def take_up(self, resumed: Path, best: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint: what is newer in this folder is set aside, and the best is the one it knew."""
        if resumed.parent.resolve() != self._folder.resolve():
            return
        self._set_aside(resumed)
        self.last = resumed
        if best is not None:
            self.best = best["value"]
            if best["is_this"]:
                files.point_to(self._folder, BEST, resumed.name)

    def _write(self, update: int, model: Mapping[str, Any], state: Mapping[str, Any], best: float | None) -> None:
        try:
            self.last = files.write(self._folder, update, model, state)
            self.saves += 1
            if best is not None:
                files.point_to(self._folder, BEST, self.last.name)
                self.best = best
            self._prune()
            self.error = None
        except Exception as error:  # a full disk, above all: safetensors has an error of its own for it
            self.error = error
            kept = f"the last whole one is {self.last}" if self.last else "there is none yet"
            log.error(
                "the checkpoint of update %d could not be saved: %s. Training goes on and tries again at the next; %s.",
                update,
                error,
                kept,
            )

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        best = files.pointed(self._folder, BEST)
        oldest_first = sorted(files.candidates(self._folder), key=files.age, reverse=True)
        of_each_update = {files.age(path)[0]: path for path in oldest_first}
        newest = list(of_each_update.values())[-self._keep_last :]
        for path in files.candidates(self._folder):
            if path not in newest and path.name != best and path != self.last:
                files.remove(path)

    def _set_aside(self, resumed: Path) -> None:
        """Rename what is newer than the checkpoint that the run goes on from: damaged, or of a branch left behind."""
        for path in files.candidates(self._folder):
            if files.age(path) < files.age(resumed):
                aside = path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:8]}")
                path.rename(aside)
                log.warning("going on from %s: the newer %s is set aside as %s.", resumed.name, path.name, aside.name)
        files.point_to(self._folder, files.POINTER, resumed.name)
