"""A run's folder over time: found again, gone on with, and saved into. Without a run_dir it keeps nothing."""

from __future__ import annotations

import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint.files import FORMAT, CheckpointError
from engine.checkpoint.snapshot import Saved, find, snapshot
from engine.checkpoint.writer import Best, Saver
from engine.records.run_folder import MARK, RunFolder
from engine.signals import Interrupts

if TYPE_CHECKING:
    from engine.trainer import Trainer


class Keeper:
    """Finds the checkpoint to go on from, and saves at boundaries: all processes together, process 0 writes."""

    def __init__(self, trainer: Trainer, interrupts: Interrupts) -> None:
        self._trainer = trainer
        self._interrupts = interrupts
        self._settings = trainer.settings
        self._strategy = trainer.strategy
        run_dir = self._strategy.gather(self._settings["run_dir"])[0]
        self._folder = None if run_dir is None else Path(run_dir)
        self._best = Best(self._settings["keep_best"]) if self._settings["keep_best"] else None
        self._saver: Saver | None = None
        self._saved_at = time.perf_counter()
        self._stalled = 0.0
        self._saved_place: tuple[int, int] | None = None
        self.run: RunFolder | None = None
        """The folder, on process 0."""

    def find(self) -> Saved | None:
        """Return the checkpoint to go on from, if there is one. Raises CheckpointError."""
        resume = self._settings["resume"]
        if resume == "never" or (resume == "auto" and self._folder is None):
            return None
        return find(resume, self._folder and self._folder / "checkpoints", self._strategy)

    def open(self, configuration: dict[str, Any], saved: Saved | None) -> None:
        """Make or take over the folder, on process 0. Raises FileExistsError or OSError on all processes."""
        if self._folder is None:
            return
        problem: Exception | None = None
        if self._strategy.rank == 0:
            try:
                self.run = RunFolder(self._folder, takes_over=self._settings["resume"] != "never")
                self.run.write("config.json", {MARK: FORMAT, **configuration})
                undone = self.run.rewind(self._trainer.update, self._trainer.validated)
                self._saver = Saver(self._folder / "checkpoints", self._settings["keep_last_checkpoints"])
                if saved is not None:
                    self._saver.take_up(saved.path, saved["best"])
                self.tell(
                    "start" if saved is None else "resume",
                    undone=undone,
                    processes=self._strategy.data_parallel_size,
                    strategy=self._strategy.describe(),
                    torch=torch.__version__,
                    python=platform.python_version(),
                )
            except OSError as error:
                problem = error
        self._raise_together(problem)
        self._check_shared()
        if saved is not None:
            self._saved_place = self._place

    def _check_shared(self) -> None:
        """Raise ValueError where a process does not see the folder: it could not go on from there."""
        sees = self._strategy.gather(self._folder is not None and (self._folder / "config.json").is_file())
        if not all(sees) and self._settings["resume"] != "never":
            blind = ", ".join(str(rank) for rank, does in enumerate(sees) if not does)
            raise ValueError(
                f"run_dir={str(self._folder)!r} of process 0 is not there for processes {blind}: name a folder on a "
                "disk that all hosts share, or use resume='never' for a run that cannot be gone on with."
            )

    def tell(self, event: str, **facts: Any) -> None:
        """Note in events.jsonl what happens to the run, when, and where in it; on process 0, at boundaries only."""
        if self.run is None:
            return
        trainer = self._trainer
        self.run.tell(
            {
                "event": event,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "update": trainer.update,
                "epoch": trainer.epoch,
                "samples": trainer.samples,
                "seconds": round(trainer.elapsed, 3),
                **facts,
            }
        )

    @property
    def last(self) -> str:
        """Where the newest checkpoint is, when what is being written is written; other processes know the folder."""
        if self._saver is not None:
            self._saver.wait()
            if self._saver.last is not None:
                return str(self._saver.last)
        return "none" if self._folder is None else f"in {self._folder / 'checkpoints'}"

    def wants_save(self) -> bool:
        """Whether this process would save after the coming update: it was asked to, or process 0's clock says so."""
        minutes = self._settings["save_every_n_minutes"]
        if self._folder is None:
            return False
        is_late = minutes is not None and time.perf_counter() - self._saved_at > 60 * minutes
        return self._interrupts.wants_save or (is_late and self._strategy.rank == 0)

    def save_if_due(self, is_asked: bool) -> bool:
        """Save after an update, where all processes have agreed to or it is the n-th; return whether it was so."""
        every = self._settings["save_every_n_updates"]
        is_due = is_asked or (every is not None and self._trainer.update % every == 0)
        if is_due:
            self.save()
        return is_due

    def save_if_best(self) -> None:
        """Save after a validation that is the best of those that have been kept."""
        if self._best is None:
            return
        value = self._best.value(self._trainer.metrics)
        if self._saver is not None:
            self._saver.wait()
        best = self._strategy.gather(self._saver.best if self._saver else None)[0]
        if self._best.improves(value, best):
            self.save(best=value)

    def save(self, best: float | None = None, is_last: bool = False) -> None:
        """Save now, in the background: nothing a second time, and no run of skipped updates before its end."""
        if self._folder is None or (self._trainer.skipped_in_a_row and not is_last):
            return
        if self._saved_place == self._place and best is None:
            return
        started = time.perf_counter()
        self._trainer.loop.check_replicas(self._trainer.update)
        self._trainer.seconds = self._trainer.elapsed
        model, state = snapshot(self._trainer)
        if self._saver is not None:
            self._saver.wait()
            known = best if best is not None else self._saver.best
            state["best"] = None if known is None else {"value": known, "is_this": best is not None}
            self._saver.save(self._trainer.update, model, state, best)
        took = time.perf_counter() - started
        self._stalled += took
        meter = self._trainer.loop.meter
        spent = meter.spent if meter is not None else {}
        self.tell("save", took=round(took, 3), spent={what: round(seconds, 3) for what, seconds in spent.items()})
        self._saved_at, self._saved_place = time.perf_counter(), self._place
        self._interrupts.wants_save = False

    def finish(self) -> None:
        """Save, and wait until it is written; try once more where that failed.

        Raises on all processes what the writing failed with: the run must not end as if it were kept.
        """
        if self._folder is None:
            return
        self.save(is_last=True)
        if self._has_failed():
            self._saved_place = None
            self.save(is_last=True)
            self._has_failed()
            self._raise_together(self._saver.error if self._saver else None)

    def _has_failed(self) -> bool:
        """Wait for the last save, and return whether it failed, on all processes."""
        started = time.perf_counter()
        if self._saver is not None:
            self._saver.wait()
        self._stalled += time.perf_counter() - started
        return bool(self._strategy.gather(self._saver is not None and self._saver.error is not None)[0])

    @property
    def costs(self) -> dict[str, Any]:
        """What saving has cost, for the summary."""
        saver = self._saver
        return {"saves": saver.saves, "seconds_stalled_by_saves": round(self._stalled, 3)} if saver else {}

    @property
    def _place(self) -> tuple[int, int]:
        return self._trainer.epoch, self._trainer.update

    def _raise_together(self, problem: Exception | None) -> None:
        text = self._strategy.gather(f"{type(problem).__name__}: {problem}" if problem else None)[0]
        if problem is not None:
            raise problem
        if text:
            raise CheckpointError(f"process 0 could not write the run's folder: {text}")
