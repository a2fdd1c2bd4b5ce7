"""Finds, resumes and saves checkpoints in `run_dir`. Without a `run_dir` it does nothing."""

import platform
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine.checkpoint import files
from engine.checkpoint.find import Checkpoint, find_checkpoint
from engine.checkpoint.snapshot import RunParts, check_snapshot, snapshot
from engine.checkpoint.writer import BEST, CheckpointWriter
from engine.disk import shown
from engine.errors import CheckpointError, RunDirLostError, RunDirTakenError, StorageError, UserError, describe, writing
from engine.records.metric import MetricRule
from engine.records.run_folder import RunFolder, read_mark
from engine.settings import Settings
from engine.signals import Signals
from engine.state import RunState
from strategies import Strategy


class Checkpointer:
    """Saves at boundaries: all processes together, process 0 writes."""

    def __init__(self, settings: Settings, strategy: Strategy, signals: Signals) -> None:
        self._settings, self._strategy, self._signals = settings, strategy, signals
        run_dir = strategy.first(settings.run_dir)
        self._folder = None if run_dir is None else _real(run_dir)
        self._rule = MetricRule("keep_best", settings.keep_best) if settings.keep_best else None
        self._writer: CheckpointWriter | None = None  # on process 0
        self._saved_at = time.perf_counter()
        self._stalled_seconds = 0.0
        self._saved_boundary: tuple[int, int] | None = None
        self._is_checked = False
        self._state = RunState()
        self._parts: RunParts
        self._found: Any = None
        self.run_folder: RunFolder | None = None  # on process 0

    def find(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, if there is one. Raises CheckpointError."""
        resume = self._settings.resume
        if resume == "never" or (resume == "auto" and self._folder is None):
            return None
        self._found = self._contents()
        return find_checkpoint(resume, self._folder, self._strategy)

    def _contents(self) -> Any:
        """Return a value that changes if another run begins or saves in the folder."""
        folder = self._folder
        return folder and (files.candidates(folder / "checkpoints"), (read_mark(folder) or {}).get("start"))

    def open(self, config: Mapping[str, Any], checkpoint: Checkpoint | None, state: RunState, parts: RunParts) -> None:
        """Make or take over the folder, on process 0. Raises RunDirTakenError or OSError on all processes."""
        self._state, self._parts = state, parts
        if parts.base is not None:
            parts.base.begin()
        if self._folder is None:
            return
        problem: Exception | None = None
        if self._strategy.rank == 0:
            try:
                with writing(f"run_dir={str(self._folder)!r}"):
                    self._open(self._folder, config, checkpoint)
            except OSError as error:
                problem = error
        self._raise_together(problem)
        self._check_shared()
        if checkpoint is not None:
            self._saved_boundary = self._boundary

    def _open(self, folder: Path, configuration: Mapping[str, Any], checkpoint: Checkpoint | None) -> None:
        state, keep_last = self._state, self._settings.keep_last_checkpoints
        self.run_folder = run_folder = RunFolder(folder, takes_over=self._settings.resume != "never")
        if self._settings.resume != "never" and self._contents() != self._found:
            raise RunDirTakenError(
                f"run_dir={str(folder)!r}: another run has written it since this one was started. Use a new folder, or "
                "start again to resume that run."
            )
        checkpoints = folder / "checkpoints"
        own = checkpoint if checkpoint is not None and checkpoint.path.parent.resolve() == checkpoints else None
        run = (own and ((read_mark(folder) or {}).get("run") or files.run_id(own.path))) or uuid.uuid4().hex
        run_folder.configure({"format": files.FORMAT, "run": run}, configuration)
        undone = run_folder.rewind(state.update, state.validated_update)
        self._writer = CheckpointWriter(checkpoints, keep_last, run, run_folder.force_to_disk)
        if own is not None:
            self._writer.resume_from(own.path, own["best"], self._settings.keep_best)
        place = {"processes": self._strategy.data_parallel_size, "strategy": self._strategy.describe()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        self.log_event("start" if checkpoint is None else "resume", undone=undone, **place, **versions)

    def _check_shared(self) -> None:
        """Raise UserError if a process does not see the folder: it could not resume from it."""
        sees = self._strategy.compare(self._folder is not None and (self._folder / "config.json").is_file())
        if not all(sees) and self._settings.resume != "never":
            blind = ", ".join(str(rank) for rank, does in enumerate(sees) if not does)
            raise UserError(
                f"run_dir={str(self._folder)!r}: process {blind} cannot see it. Use storage shared by all hosts, or "
                "resume='never'."
            )

    def log_event(self, event: str, **facts: Any) -> None:
        """Append what happened to events.jsonl, with the time and the position; on process 0, at boundaries only."""
        if self.run_folder is not None:
            state, now = self._state, datetime.now(UTC).isoformat(timespec="seconds")
            counts = {"update": state.update, "epoch": state.epoch, "samples": state.samples}
            place = {"time": now, **counts, "seconds": round(state.elapsed, 3)}
            self.run_folder.log_event({"event": event, **place, **facts})

    def close(self) -> None:
        """Let go of the folder: another run may take it over."""
        if self.run_folder is not None:
            self.run_folder.close()

    @property
    def newest(self) -> str:
        """The newest checkpoint, once it is written; processes other than 0 know its folder only."""
        if (writer := self._idle_writer()) is not None and writer.newest is not None:
            return shown(writer.newest)
        return "none" if self._folder is None else f"in {shown(self._folder / 'checkpoints')}"

    def _idle_writer(self) -> CheckpointWriter | None:
        """Return the writer, on process 0, once nothing is being written."""
        if self._writer is not None:
            self._writer.wait()
        return self._writer

    def wants_save(self) -> bool:
        """Whether this process requests a save after the next update: by a signal, or by the clock of process 0."""
        if self._folder is None:
            return False
        minutes = self._settings.save_every_n_minutes
        is_late = minutes is not None and time.perf_counter() - self._saved_at > 60 * minutes
        return self._signals.save_requested or (is_late and self._strategy.rank == 0)

    def check(self) -> None:
        """Raise UserError, on all processes, for state that no checkpoint could hold."""
        if self._folder is not None:
            check_snapshot(self._state, self._parts)

    def save_if_due(self, is_requested: bool) -> bool:
        """Save after an update if all processes agreed to, or if it is the n-th; return whether it was due."""
        if not self._is_checked and self._state.update > self._state.skipped:
            self.check()  # optimizer and stream have a state by now
            self._is_checked = True
        every = self._settings.save_every_n_updates
        if is_due := is_requested or (every is not None and self._state.update % every == 0):
            self.save()
        return is_due

    def save_if_best(self) -> None:
        """Save after a validation that is the best so far."""
        if self._rule is None:
            return
        value = self._rule.value(self._state.metrics)
        writer = self._idle_writer()
        if self._rule.improves(value, self._strategy.first(writer and writer.best)):
            self.save(best=value)

    def save(self, best: float | None = None, is_last: bool = False) -> None:
        """Save in the background; no boundary twice, and no run of skipped updates before its end."""
        if self._folder is None or (self._state.skipped_in_a_row and not is_last):
            return
        is_lost = self._strategy.first(self.run_folder is not None and self.run_folder.is_lost)
        if self._saved_boundary == self._boundary and best is None and not is_lost:
            return
        started = time.perf_counter()
        self._parts.updater.exchange.check_replicas(self._state.update)
        self._state.stop_clock()
        model, topics = snapshot(self._state, self._parts)
        if is_lost:
            self._rescue(model, topics)
        if (writer := self._idle_writer()) is not None and self.run_folder is not None:
            known = best if best is not None else writer.best
            name, rule = files.pointed(self._folder / "checkpoints", BEST), self._settings.keep_best
            of_best = {"value": known, "is_this": best is not None, "name": name, "rule": rule}
            topics["best"] = None if known is None else of_best
            try:
                self.run_folder.flush()
            except OSError as error:  # a checkpoint never counts a record that is not on disk
                writer.fail(self._state.update, error)
            else:
                writer.save(self._state.update, model, topics, best)
        took = time.perf_counter() - started
        self._stalled_seconds += took
        spent = self._parts.updater.timer.seconds_by_activity
        self.log_event("save", took=round(took, 3), spent={name: round(value, 3) for name, value in spent.items()})
        self._saved_at, self._saved_boundary = time.perf_counter(), self._boundary
        self._signals.save_requested = False

    def _rescue(self, model: Mapping[str, Any], topics: dict[str, Any]) -> NoReturn:
        """Save beside the folder that is lost, and raise RunDirLostError on all processes."""
        way_out = ""
        if (writer := self._idle_writer()) is not None and self.run_folder is not None:
            try:
                self.run_folder = self.run_folder.rescue()
                checkpoints = self.run_folder.path / "checkpoints"
                files.write(checkpoints, self._state.update, model, {**topics, "best": None}, writer.run)
                way_out = f"Use run_dir={str(self.run_folder.path)!r} to resume: the run is saved there."
            except Exception as error:  # as in CheckpointWriter
                way_out = f"The run could not be saved beside it: {error}. Use the folder that was moved, if it was."
        way_out = self._strategy.first(way_out)
        raise RunDirLostError(
            f"run_dir={str(self._folder)!r}: expected the folder of this run, which was moved, deleted or replaced. "
            f"{way_out}"
        )

    def finish(self) -> None:
        """Save, and wait for it; try once more if that failed. All processes raise the error of a second failure."""
        if self._folder is None:
            return
        for _ in range(2):
            self.save(is_last=True)
            started = time.perf_counter()
            writer = self._idle_writer()
            self._stalled_seconds += time.perf_counter() - started
            if not self._strategy.first(writer is not None and writer.error is not None):
                return
            self._saved_boundary = None
        self._raise_together(writer.error if writer is not None else None)

    def write_results(self, summary: Mapping[str, Any]) -> None:
        """Write summary and final weights, after `finish`. Raises StorageError."""
        strategy = self._strategy
        left_out = strategy.left_out = {} if self._parts.base is None else self._parts.base.digests()
        parts = strategy.state_dict() if strategy.rank == 0 or not strategy.holds_all else {}
        if self.run_folder is not None and self._writer is not None:
            with writing(f"run_dir={self._settings.run_dir!r}"):
                self.run_folder.left_out = left_out
                costs = {"saves": self._writer.saves, "seconds_stalled_by_saves": round(self._stalled_seconds, 3)}
                self.run_folder.write("summary.json", {**summary, **costs})
                self.run_folder.save_weights(parts["model"])
        self.log_event("end")

    @property
    def _boundary(self) -> tuple[int, int]:
        return self._state.epoch, self._state.update

    def _raise_together(self, problem: Exception | None) -> None:
        kind = CheckpointError if isinstance(problem, UserError) else StorageError
        told = self._strategy.first((kind, describe(problem)) if problem else None)
        if problem is not None:
            with writing(f"the last checkpoint in {self._folder}"):
                raise problem
        if told:
            raise told[0](f"process 0 could not write the run's folder: {told[1]}")


def _real(run_dir: str) -> Path:
    """Return the folder behind a name or link, wherever the process goes and the link points later."""
    try:
        return Path(run_dir).resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"run_dir={run_dir!r}: expected a folder, found a link to itself. Remove it.") from error
