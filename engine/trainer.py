"""The trainer: settings in, a trained model out."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.callbacks.accumulation import brought_callbacks, find_scheduler
from engine.callbacks.base import around_validation, as_callbacks, call
from engine.callbacks.progress import Progress
from engine.checkpoint.checkpointer import Checkpointer
from engine.checkpoint.snapshot import restore
from engine.data.checks import check_auto, check_window_losses, check_windows
from engine.errors import ProcessFailureError, UserError, describe, writing
from engine.loggers.base import Start, opened
from engine.loggers.names import make_loggers
from engine.plan.schedule import Schedule, make_schedule
from engine.plan.windows import Plan
from engine.records.recorder import Recorder, summarize
from engine.records.run_folder import RunFolder
from engine.settings import Settings, class_path, takes
from engine.signals import Signals
from engine.state import Control, RunState
from engine.task import Task
from engine.training.build import Layout, build, check_compiles, first_model, hyperparameters, means, prepare_data
from engine.training.fit_memory import Trial, build_to_fit
from engine.training.heartbeat import Heartbeat
from engine.training.prediction import Prediction
from engine.training.session import Session
from engine.update.exchange import lost_contact
from engine.update.message import Slowest
from engine.update.precision import numerics
from engine.update.timing import ReductionCost
from engine.update.updater import Updater
from strategies import resolve, with_modes

log = logging.getLogger("tally")


class Trainer:
    """Trains a `Task` on a `Strategy`: one exact update per window of K micro-batches of N samples on P processes.

    The arguments are those of `Settings`. Raises UserError, a ValueError, for an invalid one before anything starts.
    """

    @takes(Settings)
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.strategy = resolve(settings.strategy)
        check_compiles(settings.compile_model, self.strategy)
        self.callbacks = as_callbacks(settings.callbacks) + ([Progress()] if settings.progress else [])
        self.loggers = make_loggers(settings.loggers, settings.run_dir)
        """The loggers that get records, beside the `run_dir`."""
        B = settings.effective_batch_size
        self.scheduling = scheduling = find_scheduler(self.callbacks, settings.accumulate_grad_batches, B)
        check_auto(settings.micro_batch_size, self.strategy)
        schedule = make_schedule(settings.N, self.strategy.effective_batch, scheduling.by_start, scheduling.unit, B)
        check_windows({stage.first: stage.accumulate_grad_batches for stage in schedule.stages}, self.strategy)
        self.state = RunState()
        """The epoch, the update and the other counters of the run."""
        self._control = Control()
        self._signals = Signals()
        self._recorder = Recorder([])
        self._checkpointer: Checkpointer | None = None
        self._updater: Updater | None = None
        self._layout: Layout | None = None
        self._is_running = False
        self._trained: type[Task] | None = None  # the class of the task whose model was trained
        self.tried: list[Trial] = []
        """The micro-batch sizes that `micro_batch_size="auto"` has tried."""
        self.task: Task | None = None
        self.model: nn.Module
        self.optimizer: Optimizer
        self.lr_scheduler: LRScheduler | None = None
        self.run_folder: RunFolder | None = None
        """The folder that the run writes, on process 0."""
        self.has_validation = False
        """Whether there is validation data."""

    def fit(self, task: Task) -> None:
        """Train `task` to the end of the run, from its start or from the checkpoint that `resume` finds.

        With a `run_dir`, SIGTERM, SIGINT and SIGHUP end it at the next boundary with a checkpoint (`interrupted_by`
        then names the signal), and SIGUSR1 saves one. Raises what the task raises, UserError if the task cannot be
        trained, CheckpointError if the run cannot be resumed, RunDirTakenError for a `run_dir` in use, and StorageError
        if the run's own files could not be written.
        """
        with self._alone("fit", task), ExitStack() as exits:
            check_window_losses(task, self.strategy, self.settings.prefetch_to_device)
            self.state, self._control, self._signals, self._trained = RunState(), Control(), Signals(), None
            try:
                self.strategy.setup()
                if self.settings.run_dir is not None:
                    exits.enter_context(self._signals)  # until all is closed
                with Heartbeat(self.strategy, self._progress):
                    session = self._build(task)
                    self._trained = type(task)
                    session.run()
                    self._finish()
            except BaseException as error:
                self._report(error)
                raise
            finally:
                checkpointer, self._checkpointer = self._checkpointer, None
                self._updater = task._log_entries = None  # hooks, workers and logging end with the run
                self.strategy.teardown()
                with writing(f"run_dir={self.settings.run_dir!r}"):
                    self._recorder.close()
                    if checkpointer is not None:
                        checkpointer.close()

    def _build(self, task: Task) -> Session:
        """Build the run, resume it if there is a checkpoint, and open its outputs."""
        settings, strategy = self.settings, self.strategy
        self.task, self._recorder = task, Recorder([])
        self._checkpointer = checkpointer = Checkpointer(settings, strategy, self._signals)
        checkpoint = checkpointer.find()
        signals, configuration = self._signals, self.configuration
        prepare_data(task, strategy)
        parts = task, settings, self.scheduling, strategy, self.callbacks, signals, checkpoint, configuration
        run, N, self.tried = build_to_fit(partial(build, *parts), settings, self.scheduling, checkpoint)
        self._layout, self._updater, self.has_validation = run.layout, run.parts.updater, run.validation is not None
        self.model, self.optimizer, self.lr_scheduler = run.parts.model, run.parts.optimizer, run.parts.lr_scheduler
        if checkpoint is not None:
            self.state = restore(checkpoint, run.parts, settings.resume_with_changes)
        self.state.micro_batch_size = N
        if self.state.stream_micro_batch_size:
            run.cut(self.state.stream_micro_batch_size)
        self.state.start_clock()
        checkpointer.open({"task": class_path(task), **configuration}, checkpoint, self.state, run.parts)
        self.run_folder = checkpointer.run_folder
        facts = {**hyperparameters(task, self.model, self.plan), **configuration}
        self._recorder = Recorder(self._open_loggers(facts), self.state.samples)
        positions = None if checkpoint is None else checkpoint["positions"]
        kept = run, settings, self.state, self._control, self._signals, checkpointer, self._recorder
        return Session(*kept, partial(call, self), partial(around_validation, self), positions)

    def _open_loggers(self, facts: dict[str, Any]) -> list[Any]:
        if self.strategy.rank != 0:
            return []
        state, folder = self.state, self.run_folder
        counts = state.update, state.validated_update, state.record, state.weight
        if folder is None:
            return opened(self.loggers, Start(None, *counts, facts))
        return [folder, *opened(self.loggers, Start(folder.path, *counts, facts, folder.pinned, folder.run))]

    def _finish(self) -> None:
        """Save, and write the results of a run that is over."""
        assert self._checkpointer is not None
        self.state.stop_clock()
        if not self.interrupted_by:
            self.strategy.synchronize_buffers(self.model)
        self._checkpointer.finish()
        for part in with_modes(self.optimizer):  # the model that is kept is the one that was validated
            part.eval()
        if self.interrupted_by:
            self._checkpointer.log_event("interrupt", reason=self.interrupted_by)
            call(self, "on_interruption")
            if self.strategy.rank == 0:
                text = "%s: stopped after update %d and saved %s. Start the same command again to resume."
                log.warning(text, self.interrupted_by, self.update, self._checkpointer.newest)
            return
        if self.settings.run_dir is not None:
            call(self, "on_save_weights")
            self._checkpointer.write_results(summarize(self.state, self.strategy, self.reduction_cost))
        call(self, "on_fit_end")

    def _report(self, error: BaseException) -> None:
        """Tell the others of an error. Raises ProcessFailureError in its place if contact with one is lost."""
        for callback in self.callbacks:
            try:
                callback.on_exception(self, error)
            except Exception:  # the run's own error is the one to raise
                log.exception("%s.on_exception raised an error.", type(callback).__name__)
        if self._checkpointer is not None:
            self._checkpointer.log_event("fail", reason=describe(error))
        if self.strategy.processes == 1 or isinstance(error, ProcessFailureError):
            return
        if isinstance(error, Exception) and self.strategy.has_lost_contact(error):
            raise lost_contact(self.strategy, f"in update {self.update}", error) from error
        self.strategy.report(describe(error))

    def validate(self, task: Task) -> dict[str, float]:
        """Return the means of `task.evaluate` over its validation data, of the model that this trainer has trained.

        Before `fit` the model is the one that `fit` would start from: of the newest checkpoint in `run_dir`, else of
        `weights`, else a new one. Raises UserError for a task without validation data, for one of another class than
        the one trained, and for a `run_dir` without a checkpoint.
        """
        with self._evaluating("validate", task):
            N = self.micro_batch_size
            self.state.metrics = means(task, "validation_data", self.model, self.settings, self.strategy, N)
        return self.metrics

    def test(self, task: Task) -> dict[str, float]:
        """Return the means of `task.evaluate` over all of its `test_data`: otherwise as `validate`."""
        with self._evaluating("test", task):
            return means(task, "test_data", self.model, self.settings, self.strategy, self.micro_batch_size)

    def predict(self, task: Task, data: Any, folder: str | None = None) -> Any:
        """Return what `task.predict` returns for `data`, put together, on process 0; None on the others.

        The model is that of `validate`. `data` is what `Task.validation_data` may return: each sample of a dataset has
        one row, in order, whatever P is. A `folder` gets them instead, in files `part-*.safetensors` in order. Raises
        UserError for outputs that do not fit the memory, and for a folder in use.
        """
        with self._evaluating("predict", task):
            return Prediction(data, task, self.strategy, self.settings).run_on(self.model, folder)

    @contextmanager
    def _evaluating(self, method: str, task: Task) -> Iterator[None]:
        """Set up the strategy and `model`, which is the trained one, or the one that `fit` would start from."""
        with self._alone(method, task):
            try:
                self.strategy.setup()
                prepare_data(task, self.strategy)
                if self._trained is None:
                    self.model = first_model(task, self.settings, self.strategy, self.callbacks)
                _check_class(task, self._trained)
                self.task = task
                with around_validation(self):
                    yield
            finally:
                self.strategy.teardown()

    @contextmanager
    def _alone(self, method: str, task: Task) -> Iterator[None]:
        """Set torch's switches, and add the callbacks of `task`. Raises UserError for another object, or in a run."""
        if not isinstance(task, Task):
            raise UserError(f"task={task!r}: expected an object of a class that derives from Task.")
        if self._is_running:
            raise UserError(f"{method}() was called while this trainer runs. Use another Trainer, after it.")
        given = self.callbacks
        self._is_running, self.callbacks = True, brought_callbacks(task, self) + given
        try:
            with numerics(self.settings.deterministic, self.settings.tf32):
                yield
        finally:
            self._is_running, self.callbacks = False, given

    def stop(self, is_collective: bool = False) -> None:
        """End the run: at once in one process; with several, all together after the next update.

        `is_collective` says that all processes call this in the same event: then they need not agree on it first.
        """
        self._control.stop_requested, self._control.stop_is_collective = True, is_collective

    # What callbacks read

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.state.epoch

    @property
    def update(self) -> int:
        """Updates since the start, skipped ones included."""
        return self.state.update

    @property
    def samples(self) -> int:
        """Samples trained on since the start, over all processes."""
        return self.state.samples

    @property
    def weight(self) -> float:
        """The weight of those samples: samples, or valid tokens."""
        return self.state.weight

    @property
    def skipped(self) -> int:
        """Updates skipped since the start."""
        return self.state.skipped

    @property
    def record(self) -> dict[str, Any]:
        """The record of the last update: one line of metrics.jsonl."""
        return self.state.record

    @property
    def metrics(self) -> dict[str, float]:
        """The newest results of a validation."""
        return self.state.metrics

    @property
    def interrupted_by(self) -> str:
        """The signal that ended the run before its end; "" if none did."""
        return self._control.interrupted_by

    @property
    def micro_batch_size(self) -> int:
        """N, samples per micro-batch: smaller than it was set if memory ran out."""
        return self.state.micro_batch_size or self.settings.N

    @property
    def schedule(self) -> Schedule:
        """The stages of the run, on the current processes."""
        assert self._layout is not None, "schedule is known during and after fit"
        return self._layout.schedule

    @property
    def plan(self) -> Plan | None:
        """Every window of the run, for map-style data."""
        return None if self._layout is None else self._layout.plan

    @property
    def total_updates(self) -> int | None:
        """The exact number of updates of the run; None for a stream that is bounded by epochs."""
        return None if self._layout is None else self._layout.total_updates

    @property
    def reduction_cost(self) -> ReductionCost | None:
        """The time that the reduction takes of an update; None if it is unknown."""
        return self._updater.timer.cost if self._updater is not None else None

    @property
    def sees_reduction(self) -> bool:
        """Whether there is a reduction whose cost can be measured."""
        return self._updater is not None and self._updater.timer.sees_reduction

    @property
    def slowest(self) -> Slowest | None:
        """The process that all others wait for, by its own seconds of a window; None if it is not known."""
        return self._updater.exchange.slowest if self._updater is not None else None

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings as JSON values, with strategy and callbacks by class."""
        scheduling = {"scheduling": self.scheduling.by_start, "scheduling_unit": self.scheduling.unit}
        return {**self.settings.as_json(self.strategy, self.callbacks), **scheduling}

    def _progress(self) -> tuple[int, int]:
        return self.update, self._updater.losses.micro_batches if self._updater is not None else 0


def _check_class(task: Task, trained: type[Task] | None) -> None:
    """Raise UserError for a task of another class than the one `trained`, if there was one."""
    if trained is not None and not (isinstance(task, trained) or issubclass(trained, type(task))):
        what = f"task={type(task).__name__}: this trainer has trained {trained.__name__}"
        raise UserError(f"{what}. Give a task of that class, or use another Trainer.")
