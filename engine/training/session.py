"""The epochs of a run that is built: windows, updates, validations, saves, and whom to tell of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from engine.callbacks.base import validating
from engine.checkpoint.checkpointer import Keeper
from engine.data.window import Source, Window
from engine.order import mix
from engine.records.recorder import Records
from engine.seeds import EPOCH_STREAM, seed_everything
from engine.signals import Interrupts
from engine.training.validation import Evaluation
from engine.update.message import NOTHING, NonFiniteError, Wishes
from engine.update.updater import Compute

if TYPE_CHECKING:
    from engine.trainer import Trainer


class Epochs:
    """Runs what a trainer has built, from where it stands to where it ends."""

    def __init__(
        self,
        trainer: Trainer,
        source: Source,
        compute: Compute,
        validation: Evaluation | None,
        keeper: Keeper,
        records: Records,
        interrupts: Interrupts,
        resumed: Any,
    ) -> None:
        self._trainer = trainer
        self._settings = trainer.settings
        self._has_lr_rule = trainer.settings["lr_rule"] != "none"
        self._source = source
        self._compute = compute
        self._validation = validation
        self._keeper = keeper
        self._records = records
        self._interrupts = interrupts
        self._resumed = resumed
        """Where each process's data stood, until an epoch has taken that up."""

    def run(self) -> None:
        """Run until the run is over, stopped or interrupted."""
        trainer = self._trainer
        trainer.call("on_fit_start")
        self._since = time.perf_counter()
        self._records.restart_clock()
        self._validate_if_due()  # an interruption may have come between an update and its validation
        over = self._is_over
        while not (over or self._stops_now or trainer.interrupted):
            over = self._run_epoch()
        if not trainer.interrupted:
            self._validate()

    def _run_epoch(self) -> bool:
        """Run an epoch, or what is left of it, and return whether the run is over."""
        trainer = self._trainer
        seed_everything(mix(self._settings["seed"], EPOCH_STREAM, trainer.epoch))  # for iterables that draw
        positions, self._resumed, over, update = self._resumed, None, False, trainer.update
        if trainer.begun != trainer.epoch:
            trainer.begun = trainer.epoch
            trainer.call("on_epoch_start")
        for window in self._source.windows(trainer.epoch, trainer.update, trainer.samples, positions):
            over = self._run_update(window)
            if over:
                break
        if trainer.interrupted:
            return True
        trainer.loop.check_replicas(trainer.update)
        every = self._settings["validate_every_n_epochs"]
        if every is not None and (trainer.epoch + 1) % every == 0:
            self._validate()
        if trainer.interrupted:
            return True
        if trainer.ended != trainer.epoch or trainer.update > update:
            trainer.ended = trainer.epoch
            trainer.call("on_epoch_end")
        self._forget_draws()
        if not over:
            trainer.epoch += 1
        return over or self._is_over

    def _run_update(self, window: Window) -> bool:
        """Make one update, tell of it, and return whether the run is over."""
        trainer, keeper, max_time = self._trainer, self._keeper, self._settings["max_time"]
        late = max_time is not None and time.perf_counter() - self._since > max_time
        stops, saves = trainer.stops or late, keeper.wants_save()
        wishes = Wishes(stops, saves) if stops or saves else NOTHING
        outcome = trainer.loop.run_update(self._compute, window, trainer.epoch, trainer.update, wishes)
        if outcome.aborted:
            self._note_interruption()
            return True
        trainer.positions = window.position
        trainer.update += 1
        trainer.samples += outcome.samples
        trainer.weight += outcome.weight
        trainer.skipped += outcome.skipped
        trainer.skipped_in_a_row = trainer.skipped_in_a_row + 1 if outcome.overflowed else 0
        if trainer.skipped_in_a_row == self._settings["stop_after_n_skipped"]:
            raise NonFiniteError(
                f"{trainer.skipped_in_a_row} updates in a row were not finite, up to update {trainer.update}: the run "
                f"would not come back by itself. The last good checkpoint: {keeper.last}."
            )
        if trainer.loop.options.measures:
            counts: dict[str, float] = {
                "update": trainer.update,
                "epoch": trainer.epoch,
                "samples": trainer.samples,
                "skipped": trainer.skipped,
            }
            if self._has_lr_rule:
                counts["lr_factor"] = window.stage.lr_factor
            K = window.stage.accumulate_grad_batches
            trainer.record = self._records.of_update(counts, outcome, trainer.loop.lr, K)
            trainer.call("on_update_end")
        self._validate_if_due()
        over = outcome.stop or self._stops_now or trainer.update == self._settings["max_updates"]
        if not over and not trainer.interrupted and keeper.save_if_due(outcome.save):
            self._records.restart_clock()
        return over or bool(trainer.interrupted)

    @property
    def _is_over(self) -> bool:
        """Whether the run is where it was to end."""
        trainer, settings = self._trainer, self._settings
        ends = (trainer.epoch, settings["max_epochs"]), (trainer.update, settings["max_updates"])
        return any(end is not None and here >= end for here, end in ends)

    @property
    def _stops_now(self) -> bool:
        """Whether this process wants to stop and need not ask another."""
        trainer = self._trainer
        return trainer.stops and (trainer.stops_together or trainer.strategy.processes == 1)

    def _validate_if_due(self) -> None:
        every, update = self._settings["validate_every_n_updates"], self._trainer.update
        if every is not None and update and update % every == 0:
            self._validate()

    def _validate(self) -> None:
        trainer = self._trainer
        if self._validation is None or trainer.validated == trainer.update:
            return
        started = time.perf_counter()
        with validating(trainer):
            metrics = self._validation.run(trainer.model, self._interrupts)
        if metrics is None:
            self._note_interruption()
            return
        trainer.metrics, trainer.validated = metrics, trainer.update
        self._records.of_validation(trainer.update, trainer.epoch, metrics)
        self._keeper.tell("validation", took=round(time.perf_counter() - started, 3))
        trainer.call("on_validation_end")
        self._forget_draws()
        self._keeper.save_if_best()
        self._records.restart_clock()

    def _forget_draws(self) -> None:
        """What drew between two windows is no matter of theirs."""
        if (draws := self._trainer.loop.host_randomness) is not None:
            draws.forget()

    def _note_interruption(self) -> None:
        self._trainer.interrupted = self._interrupts.reason or "a signal to another process"
