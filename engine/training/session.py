"""One run: epochs, windows, updates, records, validations and saves, from where it stands to its end."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from engine.callbacks.base import Callback
from engine.checkpoint.checkpointer import Checkpointer
from engine.data.window import Window
from engine.errors import NonFiniteError
from engine.optimizers import evaluated
from engine.records.recorder import Recorder
from engine.seeds import EPOCH_STREAM, mix, seed_everything
from engine.settings import Settings
from engine.signals import Signals
from engine.state import Control, RunState
from engine.training.build import Run
from engine.training.fit_memory import did_not_fit
from engine.update.message import NO_REQUESTS, Outcome, Requests

log = logging.getLogger("tally")

REDO = "update %d did not fit into memory with N=%d: it runs again with N=%d, as does the rest of the run."


class Session:
    """Runs what was built. `call` calls the callbacks, `around_validation` is their context of a validation."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        state: RunState,
        control: Control,
        signals: Signals,
        checkpointer: Checkpointer,
        recorder: Recorder,
        call: Callable[[str], None],
        around_validation: Callable[[], AbstractContextManager[None]],
        positions: Sequence[Any] | None,
    ) -> None:
        self._run, self._settings, self._state, self._control = run, settings, state, control
        self._signals, self._checkpointer, self._recorder = signals, checkpointer, recorder
        self._call, self._around_validation = call, around_validation
        self._positions = positions  # those of all processes in the checkpoint, until an epoch resumes from them
        self._updater = run.parts.updater
        self._unheard: tuple[Window, Outcome] | None = None  # the last update, if nobody listens to records
        if any(type(callback).on_gradients is not Callback.on_gradients for callback in run.parts.callbacks):
            self._updater.on_gradients = partial(call, "on_gradients")
        self._redoes = False  # whether the last window ran out of memory, and runs again
        self._has_ended = False  # whether all processes agreed to stop

    def run(self) -> None:
        """Run until the end, a stop or an interruption."""
        self._call("on_fit_start")
        self._checkpointer.check()
        self._started = time.perf_counter()
        self._recorder.restart_clock()
        self._validate_if_due()  # the run may have been interrupted between an update and its validation
        while not self._is_over:
            self._run_epoch()
        self._record_unheard()
        if not self._control.interrupted_by:
            self._validate()

    def _run_epoch(self) -> None:
        state, control = self._state, self._control
        positions, self._positions = self._positions, None
        if state.started_epoch != state.epoch:
            state.started_epoch = state.epoch
            self._call("on_epoch_start")
        is_over = has_more = False
        while True:
            self._redoes = False
            seed_everything(mix(self._settings.seed, EPOCH_STREAM, state.epoch))  # for iterables that draw
            for window in self._run.source.windows(state.epoch, state.update, state.samples, positions):
                is_over = self._run_window(window)
                has_more = window.has_more
                if is_over:
                    break
            if not self._redoes:
                break
            positions = None if state.position is None else self._run.parts.strategy.gather(state.position)
        if control.interrupted_by:
            return
        self._updater.exchange.check_replicas(state.update)
        every = self._settings.validate_every_n_epochs
        if every is not None and (state.epoch + 1) % every == 0:
            self._validate()
        if control.interrupted_by or has_more:  # the run ends within the epoch
            return
        self._forget_draws()
        if state.finished_epoch != state.epoch:
            state.finished_epoch = state.epoch
            self._call("on_epoch_end")
        if not is_over:
            self._record_unheard()
            state.epoch += 1

    def _run_window(self, window: Window) -> bool:
        """Make one update, record it, do what is due after it, and return whether the run is over."""
        state, settings = self._state, self._settings
        is_late = settings.max_time is not None and time.perf_counter() - self._started > settings.max_time
        stop, save = self._control.stop_requested or is_late, self._checkpointer.wants_save()
        requests = Requests(stop, save) if stop or save else NO_REQUESTS
        outcome = self._updater.run(self._run.loss_of, window, state, requests)
        if outcome.out_of_memory:
            self._redoes = True
            self._halve(window)
            return True
        if outcome.aborted:
            self._note_interruption()
            return True
        state.position = window.position
        state.count(outcome.samples, outcome.weight, outcome.skipped, outcome.overflowed)
        self._has_ended = outcome.stop
        if state.skipped_in_a_row == settings.stop_after_n_skipped:
            raise NonFiniteError(
                f"{state.skipped_in_a_row} updates in a row were not finite, up to update {state.update}: the run "
                f"would not recover by itself. The last good checkpoint: {self._checkpointer.newest}."
            )
        if self._updater.options.is_recorded:
            self._record(window, outcome)
            self._call("on_update_end")
            self._recorder.log(state.record)  # with what callbacks have added
        else:
            self._unheard = window, outcome
        self._validate_if_due()
        is_over = self._is_over
        if not is_over and self._checkpointer.save_if_due(outcome.save):
            self._recorder.restart_clock()
        return is_over

    def _halve(self, window: Window) -> None:
        """Halve N: `window` did not fit. Raises UserError on all processes if it is 1."""
        run, state, N = self._run, self._state, self._run.source.largest(window)
        if N == 1:
            raise did_not_fit(self._updater, state.update)
        half = -(-N // 2)
        run.cut(half)
        if run.layout.plan is None:
            state.stream_micro_batch_size = half
        else:
            state.micro_batch_size = half
        self._checkpointer.log_event("redo", micro_batch_size=half)
        if run.parts.strategy.rank == 0:
            log.warning(REDO, state.update, N, half)

    def _record_unheard(self) -> None:
        """Let `Trainer.record` have the last update, if nobody listens."""
        if self._unheard is not None:
            self._record(*self._unheard)
            self._unheard = None

    def _record(self, window: Window, outcome: Outcome) -> None:
        state = self._state
        counts: dict[str, float] = {"update": state.update, "epoch": state.epoch, "samples": state.samples}
        counts["skipped"] = state.skipped
        if N := self._run.layout.N if self._run.layout.plan is not None else state.stream_micro_batch_size:
            counts["micro_batch_size"] = N
        if self._settings.lr_rule != "none":
            counts["lr_factor"] = window.stage.lr_factor
        K = window.stage.accumulate_grad_batches
        counts |= self._updater.lr_of_groups
        state.record = self._recorder.record(counts, outcome, self._updater.lr, K)

    @property
    def _is_over(self) -> bool:
        state, control, settings = self._state, self._control, self._settings
        if self._has_ended or control.interrupted_by:
            return True
        for here, end in ((state.epoch, settings.max_epochs), (state.update, settings.max_updates)):
            if end is not None and here >= end:
                return True
        return control.stop_requested and (control.stop_is_collective or self._updater.exchange.is_alone)

    def _validate_if_due(self) -> None:
        every, update = self._settings.validate_every_n_updates, self._state.update
        if every is not None and update and update % every == 0:
            self._validate()

    def _validate(self) -> None:
        state, validation = self._state, self._run.validation
        if validation is None or state.validated_update == state.update:
            return
        self._record_unheard()
        self._forget_draws()
        started = time.perf_counter()
        with evaluated(self._run.parts.optimizer), self._around_validation():
            metrics = validation.run(self._run.parts.model, self._signals)
        if metrics is None:
            self._note_interruption()
            return
        state.metrics, state.validated_update = metrics, state.update
        took = round(time.perf_counter() - started, 3)
        self._call("on_validation_end")
        state.metrics = metrics = {name: float(value) for name, value in metrics.items()}  # callbacks may add tensors
        self._recorder.log_validation(state.update, state.epoch, metrics)
        self._checkpointer.log_event("validation", took=took)
        self._checkpointer.save_if_best()
        self._recorder.restart_clock()

    def _forget_draws(self) -> None:
        """Ignore what callbacks and validation draw from the host's generators, up to the next window."""
        if self._updater.host_rng is not None:
            self._updater.host_rng.forget()

    def _note_interruption(self) -> None:
        self._control.interrupted_by = self._signals.name or "a signal to another process"
