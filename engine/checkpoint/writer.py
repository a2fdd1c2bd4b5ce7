"""Writes checkpoints in the background, on process 0; keeps the newest few and the best."""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import files
from engine.disk import replace_text

log = logging.getLogger("tally")

BEST = "best"  # the pointer to the best checkpoint


class CheckpointWriter:
    """Writes checkpoints of one run into `folder`, each after calling `first`; a failure is logged as an error."""

    def __init__(
        self, folder: Path, keep_last: int, run: str | None = None, first: Callable[[], None] = lambda: None
    ) -> None:
        self._folder, self._keep_last, self.run, self._first = folder, keep_last, run, first
        self._writing: threading.Thread | None = None
        self.error: Exception | None = None  # that of the last save
        self.best: float | None = None  # the metric of the best checkpoint, while that is there
        self.newest: Path | None = next(iter(files.candidates(folder)), None)
        self.saves = 0
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_parts(folder)
        probe = folder / f".{uuid.uuid4().hex}.part"
        probe.write_bytes(os.urandom(4096))  # a full or read-only disk is found now
        probe.unlink()

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

    def resume_from(self, resumed: Path, best: Mapping[str, Any] | None, rule: str | None = None) -> None:
        """Resume from a checkpoint in this folder, with the best that it knew if that is still there.

        Newer ones are renamed: they are damaged, or of an abandoned branch.
        """
        for path in files.candidates(self._folder):
            if files.age(path) < files.age(resumed):
                aside = path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:8]}")
                path.rename(aside)
                log.warning("resuming from %s: the newer %s is set aside as %s.", resumed.name, path.name, aside.name)
        replace_text(self._folder / files.POINTER, f"{resumed.name}\n")
        self.newest = resumed
        name = files.pointed(self._folder, BEST)
        if best is not None:
            name = resumed.name if best["is_this"] else best.get("name", name)
        if name not in [path.name for path in files.candidates(self._folder)]:
            (self._folder / BEST).unlink(missing_ok=True)
        elif best is not None:
            replace_text(self._folder / BEST, f"{name}\n")
            self.best = best["value"] if rule in (None, best.get("rule") or rule) else None  # that of another metric

    def _write(self, update: int, model: Mapping[str, Any], state: Mapping[str, Any], best: float | None) -> None:
        try:
            self._first()
            self.newest = files.write(self._folder, update, model, state, self.run)
            self.saves += 1
            if best is not None:
                replace_text(self._folder / BEST, f"{self.newest.name}\n")
                self.best = best
            self._prune()
            self.error = None
        except Exception as error:  # a full disk, above all: safetensors has an error of its own for it
            self.fail(update, error)

    def fail(self, update: int, error: Exception) -> None:
        """Note and log that the checkpoint of `update` could not be saved."""
        self.error = error
        kept = f"The newest is {self.newest}" if self.newest else "There is no other yet"
        what = f"the checkpoint of update {update} could not be saved: {error}"
        log.error("%s. Training continues, and tries again later. %s.", what, kept)

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        best = files.pointed(self._folder, BEST)
        oldest_first = sorted(files.candidates(self._folder), key=files.age, reverse=True)
        of_each_update = {files.age(path)[0]: path for path in oldest_first}
        newest = list(of_each_update.values())[-self._keep_last :]
        for path in files.candidates(self._folder):
            if path not in newest and path.name != best and path != self.newest:
                files.remove(path)
