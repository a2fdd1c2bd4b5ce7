"""The trainer: checks its arguments, builds what a run needs, and runs its epochs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.callbacks import Callback, Progress
from engine.callbacks.base import validating
from engine.checkpoint.checkpointer import Keeper
from engine.checkpoint.snapshot import COUNTERS, WINDOWS, Saved, class_path, load_weights, restore, schedule_of
from engine.checks import (
    check_configurations_agree,
    check_equal_windows,
    check_model,
    check_optimizer,
    check_settings,
    check_windows,
    the_callbacks,
    the_scheduler,
)
from engine.data.map_style import LoaderOptions
from engine.data.prefetch import Prefetch
from engine.data.sources import make_plan, make_source
from engine.fusing import fuse
from engine.loggers import Logger, Start, make_loggers, opened
from engine.plan.schedule import Schedule, make_schedule, with_lr_rule
from engine.plan.windows import Plan
from engine.records.recorder import Records
from engine.records.run_folder import RunFolder
from engine.records.summary import summarize
from engine.seeds import seed_everything
from engine.signals import Interrupts
from engine.task import Task
from engine.training.compile import check_compiles, compile_in_place
from engine.training.heartbeat import FAILURE, Watch, lost_contact
from engine.training.session import Epochs
from engine.training.validation import Evaluation
from engine.update.message import ProcessFailureError
from engine.update.precision import autocast, numerics
from engine.update.updater import Loop, LoopOptions
from strategies import Strategy, resolve

log = logging.getLogger("tally")


class Trainer:
    """Trains a `Task` on a `Strategy`: one exact update per window of K micro-batches of N samples on P processes.

    Args:
        strategy: "auto", "single", "dp", "ddp", "fsdp", "pipeline", or a `Strategy`.
        micro_batch_size: N, samples per micro-batch of map-style data. Ready micro-batches come in their own sizes.
        accumulate_grad_batches: K, micro-batches per process and window.
        effective_batch_size: samples per update over all processes; K follows from P. Instead of K.
        max_epochs: where the run ends, in epochs; this or `max_updates` is needed.
        max_updates: where the run ends, in updates; with both, whichever comes first.
        max_time: seconds of training after which the run ends with the update that is under way.
        lr_rule: how the learning rate follows the effective batch of each stage: "none", or "linear" or "sqrt" in its
            ratio to `lr_reference_batch`.
        lr_reference_batch: the effective batch, in samples, that the task's learning rate is for.
        gradient_clip_norm: clips the 2-norm of an update's whole gradient.
        precision: "fp32", "bf16" or "fp16" (autocast); None keeps the model's own dtype.
        compile_model: compile the model in place with torch.compile ("single" and "ddp").
        fused_optimizer: step in torch's fused kernel (an SGD, Adam or AdamW that says neither `fused` nor `foreach`).
        seed: of the model's parameters, the data order, dropout and augmentation.
        shuffle: a new global order each epoch; `Task.order` gives another one.
        spread_windows: cut each window into as many pieces of like size for all processes, so that none waits for
            another in a window that does not divide; dropout and augmentation then depend on P (map-style data).
        callbacks: one `Callback` or several.
        loggers: "csv", "tensorboard" (both write into `run_dir`), objects with `log(record)` and `close()`, or several;
            used on process 0. One that fails ends nothing.
        run_dir: a folder to write the run into, on a disk that all hosts share; nothing is written without it.
        resume: "auto" goes on with what is in `run_dir`, "never" wants a new one; or the path of a checkpoint.
        resume_with_changes: go on although the data, the seed, the windows or the optimizer are others than before.
        weights: a .safetensors file of pretrained weights, under the model's own names, for a run that starts.
        save_every_n_updates: save a checkpoint after each n-th update (and at the end, and when interrupted).
        save_every_n_minutes: and where the last one is so old; None: not by time.
        keep_last_checkpoints: how many of the newest to keep.
        keep_best: also save and keep the best by a validation mean: "min:loss", "max:accuracy".
        validate_every_n_epochs: evaluate the validation data after each n-th epoch, and at the end; None: only then.
        validate_every_n_updates: and after each n-th update.
        max_validation_samples: evaluate at most so many (map-style data).
        skip_nonfinite_updates: look at each gradient norm, and skip the update on all processes if it is not finite.
        stop_after_n_skipped: so many of these in a row end the run with an error.
        num_workers: as in torch's DataLoader (map-style data).
        pin_memory: likewise; None pins for CUDA.
        persistent_workers: likewise.
        prefetch_to_device: move the next micro-batch to the device while one is computed with; holds two more.
        deterministic: only algorithms that give the same bits each time; raises where there is none.
        tf32: whether float32 products may use TF32; None leaves torch's setting.
        progress: print a banner and progress, on process 0.

    Raises ValueError for an argument that cannot be, naming it and the way out, before anything starts.
    """

    def __init__(
        self,
        strategy: Strategy | str = "auto",
        micro_batch_size: int = 32,
        accumulate_grad_batches: int = 1,
        effective_batch_size: int | None = None,
        max_epochs: int | None = None,
        max_updates: int | None = None,
        max_time: float | None = None,
        lr_rule: str = "none",
        lr_reference_batch: int | None = None,
        gradient_clip_norm: float | None = None,
        precision: str | None = None,
        compile_model: bool = False,
        fused_optimizer: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        spread_windows: bool = False,
        callbacks: Callback | Sequence[Callback] | None = None,
        loggers: Logger | str | Sequence[Logger | str] | None = None,
        run_dir: str | None = None,
        resume: str = "auto",
        resume_with_changes: bool = False,
        weights: str | None = None,
        save_every_n_updates: int | None = None,
        save_every_n_minutes: float | None = 10.0,
        keep_last_checkpoints: int = 2,
        keep_best: str | None = None,
        validate_every_n_epochs: int | None = 1,
        validate_every_n_updates: int | None = None,
        max_validation_samples: int | None = None,
        skip_nonfinite_updates: bool = True,
        stop_after_n_skipped: int | None = 100,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        prefetch_to_device: bool = False,
        deterministic: bool = False,
        tf32: bool | None = None,
        progress: bool = False,
    ) -> None:
        arguments = dict(locals())
        del arguments["self"]
        check_settings(arguments)
        self.settings = arguments
        self.strategy = resolve(strategy)
        check_compiles(compile_model, self.strategy)
        self.callbacks = the_callbacks(callbacks) + ([Progress()] if progress else [])
        self._loggers = make_loggers(loggers, run_dir)
        self._scheduler = the_scheduler(arguments, self.callbacks, self.strategy)
        self._loader = LoaderOptions(num_workers, pin_memory, persistent_workers)
        self.epoch = 0
        """The current epoch, from 0."""
        self.update = 0
        """Updates made since the start, skipped ones included."""
        self.samples = 0
        """Samples trained on since the start, over all processes."""
        self.weight = 0.0
        """Their weight: samples, or valid tokens."""
        self.skipped = 0
        """Updates skipped since the start."""
        self.skipped_in_a_row = 0
        """Updates skipped since the last that was made, because they were not finite."""
        self.validated = 0
        """The update after which `metrics` was made."""
        self.begun = self.ended = -1
        """The epochs of the last `on_epoch_start` and `on_epoch_end`."""
        self.seconds = 0.0
        """Seconds of running, those before an interruption included."""
        self.costs: dict[str, Any] = {}
        """What saving has cost."""
        self.interrupted = ""
        """The signal that ended the run before its end, if one did."""
        self.positions: Any = None
        """Where this process's data stands; None where nothing has been read."""
        self.schedule: Schedule
        """The stages of the run, on the processes that there are."""
        self.plan: Plan | None = None
        """Every window of the run, for map-style data."""
        self.record: dict[str, Any] = {}
        """What the last update was: one line of metrics.jsonl."""
        self.metrics: dict[str, float] = {}
        """The newest validation means."""
        self.task: Task | None = None
        self.model: nn.Module
        self.optimizer: Optimizer
        self.lr_scheduler: LRScheduler | None = None
        self.loop: Loop
        self.run: RunFolder | None = None
        self._records = Records([])
        self._keeper: Keeper
        self.stops = False
        """Whether `stop()` was called."""
        self.stops_together = False
        """Whether it was called on all processes alike."""
        self.validates = False
        """Whether there is validation data."""
        self._began = 0.0

    def fit(self, task: Task) -> None:
        """Train `task` to where the run ends, from its start or from the checkpoint that `resume` finds.

        With a `run_dir`, SIGTERM and SIGINT end it at the next boundary with a checkpoint (`interrupted` says so), and
        SIGUSR1 saves one. Raises what the task raises, ValueError for what cannot be trained or gone on with, and
        FileExistsError for a `run_dir` that is taken.
        """
        self._interrupts = Interrupts()
        keeps = self.settings["run_dir"] is not None
        with numerics(self.settings["deterministic"], self.settings["tf32"]):
            try:
                self.strategy.setup()
                with self._interrupts if keeps else nullcontext(), Watch(self):
                    self._build(task).run()
                    self._finish()
            except BaseException as exception:
                for callback in self.callbacks:
                    callback.on_exception(self, exception)
                if "_keeper" in vars(self):
                    self._keeper.tell("fail", reason=f"{type(exception).__name__}: {exception}")
                if self.strategy.processes > 1 and not isinstance(exception, ProcessFailureError):
                    self._tell_of(exception)
                raise
            finally:
                for part in ("loop", "_keeper"):  # hooks and workers end with the run
                    vars(self).pop(part, None)
                self.strategy.teardown()
                self._records.close()

    def validate(self, task: Task) -> dict[str, float]:
        """Return the means of `task.evaluate` over its validation data: of the model just trained, else of a new one.

        Raises ValueError for a task without validation data.
        """
        try:
            self.strategy.setup()
            if self.task is not task:
                self._prepare_data(task)
                seed_everything(self.settings["seed"])
                self.task, self.model = task, task.configure_model().to(self.strategy.device)
            evaluation = self._evaluation(task)
            if evaluation is None:
                raise ValueError(f"{type(task).__name__}.validation_data() is None: there is nothing to validate on.")
            with validating(self):
                self.metrics = evaluation.run(self.model) or {}
            return self.metrics
        finally:
            self.strategy.teardown()

    @property
    def total_updates(self) -> int | None:
        """The exact number of updates of the run; None for a stream that is bounded by epochs."""
        if self.plan is not None:
            return self.plan.updates
        return self.settings["max_updates"] if self.settings["max_epochs"] is None else None

    @property
    def elapsed(self) -> float:
        """Seconds of running, of earlier starts too."""
        return time.perf_counter() - self._began

    def stop(self, together: bool = False) -> None:
        """End the run: at once in one process; with several, all together after the next update.

        `together` says that all processes call this in the same event: then they need not tell each other.
        """
        self.stops, self.stops_together = True, together

    @property
    def configuration(self) -> dict[str, Any]:
        """What was asked for, as JSON values: the settings, and the strategy and callbacks by class."""
        stated = {name: v for name, v in self.settings.items() if name not in ("loggers", "run_dir", "progress")}
        stated["strategy"] = class_path(self.strategy)
        stated["callbacks"] = [class_path(callback) for callback in self.callbacks]
        stated["strategy_options"] = {
            name: value for name, value in vars(self.strategy).items() if not name.startswith("_")
        }
        stated["scheduling"] = self._scheduler.scheduling if self._scheduler else None
        stated["scheduling_unit"] = self._scheduler.unit if self._scheduler else None
        return stated

    # Building

    @property
    def micro_batch_size(self) -> int:
        """N, samples per micro-batch."""
        return int(self.settings["micro_batch_size"])

    def _build(self, task: Task) -> Epochs:
        """Build data, model and optimizer, check each as soon as it is there, and return what runs them."""
        strategy, seed = self.strategy, self.settings["seed"]
        for name, value in COUNTERS.items():
            setattr(self, name, copy(value))
        self.positions = None
        self.interrupted, self.stops, self.stops_together = "", False, False
        self._records, self._keeper = Records([]), Keeper(self, self._interrupts)
        saved = self._keeper.find()
        self._prepare_data(task)
        data, N = self.lay_out(task, saved), self.micro_batch_size
        cut = seed, self.settings["shuffle"], self._loader, self.settings["spread_windows"]
        prefetch = Prefetch(strategy, task) if self.settings["prefetch_to_device"] else None
        source = make_source(data, task, strategy, self.schedule, self.plan, N, *cut, prefetch)
        validation = self._evaluation(task)
        self.validates = validation is not None
        self.make_model(task)
        if self.settings["weights"] is not None and saved is None:
            load_weights(self.model, Path(self.settings["weights"]))
        if self.settings["compile_model"]:
            compile_in_place(self.model)
        measures = bool(self.callbacks or self._loggers or self.settings["run_dir"] is not None)
        check_configurations_agree(
            strategy,
            {
                **self.configuration,
                "the number of training samples": self.plan.samples if self.plan else None,
                **{f"the shape of {name}": tuple(p.shape) for name, p in self.model.named_parameters()},
                "whether anything listens": measures,
            },
        )
        prepared = strategy.prepare(self.model)
        check_equal_windows(strategy, self.plan, N, self.settings["spread_windows"])
        self.make_optimizer(task)
        strategy.prepare_optimizer(self.optimizer)
        kept = ("gradient_clip_norm", "skip_nonfinite_updates", "precision", "seed")
        options = LoopOptions(**{name: self.settings[name] for name in kept}, measures=measures)
        compute = autocast(task.loss, self.settings["precision"], strategy.device.type)
        interrupts = self._interrupts if self.settings["run_dir"] is not None else None
        self.loop = Loop(strategy, prepared, self.optimizer, self.lr_scheduler, options, interrupts)
        resumed = None
        if saved is not None:
            restore(self, saved, self.settings["resume_with_changes"])
            resumed = saved["positions"]
            self.positions = resumed and resumed[strategy.data_parallel_rank % len(resumed)]
        self._began = time.perf_counter() - self.seconds
        self._keeper.open({"task": class_path(task), **self.configuration}, saved)
        self.run = self._keeper.run
        if strategy.rank == 0:
            folder = self.run.path if self.run is not None else None
            start = Start(folder, self.update, self.validated, self.record, self.weight, self.configuration)
            self._records = Records([*([self.run] if self.run else []), *opened(self._loggers, start)])
        return Epochs(self, source, compute, validation, self._keeper, self._records, self._interrupts, resumed)

    def lay_out(self, task: Task, saved: Saved | None = None) -> Any:
        """Cut the run of `task` into stages and windows, and return its training data. Raises ValueError."""
        self.task = task
        seed_everything(self.settings["seed"])
        N, scheduler = self.micro_batch_size, self._scheduler
        scheduling = scheduler.scheduling if scheduler else {0: self.settings["accumulate_grad_batches"]}
        unit, B = scheduler.unit if scheduler else "epoch", self.settings["effective_batch_size"]
        self.schedule = make_schedule(N, self.strategy.effective_batch, scheduling, unit, B)
        if saved is not None and self._has_same_windows(saved):
            self.schedule = schedule_of(saved, N, self.strategy)
            stages = {stage.first: stage.accumulate_grad_batches for stage in self.schedule.stages}
            check_windows(stages, self.strategy)
        self.schedule = with_lr_rule(self.schedule, self.settings["lr_rule"], self.settings["lr_reference_batch"])
        data, bounds = task.train_data(), (self.settings["max_epochs"], self.settings["max_updates"])
        self.plan = make_plan(data, task, self.schedule, N, *bounds, B)
        task.total_updates = self.total_updates
        return data

    def make_model(self, task: Task) -> None:
        """Make the model, from the run's seed. Raises ValueError for one that cannot be trained."""
        seed_everything(self.settings["seed"])
        self.model = task.configure_model()
        check_model(self.model)

    def make_optimizer(self, task: Task) -> None:
        """Make the optimizer and the LR scheduler of the model that there is. Raises ValueError for others."""
        self.optimizer, self.lr_scheduler = check_optimizer(task.configure_optimizer(self.model), self.model)
        if self.settings["fused_optimizer"]:
            fuse(self.optimizer)

    def _has_same_windows(self, saved: Saved) -> bool:
        """Whether the settings say the same of windows as those of a checkpoint: its effective batches then stay."""
        return all(str(self.configuration[name]) == saved["decides"].get(name) for name in WINDOWS)

    def _prepare_data(self, task: Task) -> None:
        """Let one process of each host fetch the data, and the others wait."""
        if self.strategy.local_rank == 0:
            task.prepare_data()
        self.strategy.barrier()

    def _evaluation(self, task: Task) -> Evaluation | None:
        data = task.validation_data()
        if data is None:
            return None
        limit, precision = self.settings["max_validation_samples"], self.settings["precision"]
        N, seed = self.micro_batch_size, self.settings["seed"]
        return Evaluation(data, task, self.strategy, N, self._loader, precision, limit, seed)

    def _finish(self) -> None:
        self.seconds = self.elapsed
        if not self.interrupted:
            self.strategy.synchronize_buffers(self.model)
        self._keeper.finish()
        self.costs = self._keeper.costs
        if self.interrupted:
            self._keeper.tell("interrupt", reason=self.interrupted)
            self.call("on_interruption")
            if self.strategy.rank == 0:
                log.warning(
                    "%s: stopped after update %d and saved %s. Start the same command again to go on.",
                    self.interrupted,
                    self.update,
                    self._keeper.last,
                )
            return
        if self.settings["run_dir"] is not None:
            parts = self.strategy.state_dict() if self.strategy.rank == 0 or not self.strategy.holds_all else {}
            if self.run is not None:
                self.run.write("summary.json", {**summarize(self, self.seconds), **self.costs})
                self.run.save_weights(parts["model"])
            self._keeper.tell("end")
        self.call("on_fit_end")

    def _tell_of(self, exception: BaseException) -> None:
        """Leave word for the other processes; raise what another has left where this one has lost contact with it."""
        if isinstance(exception, Exception) and self.strategy.has_lost_contact(exception):
            raise lost_contact(self.strategy, f"in update {self.update}", exception) from exception
        self.strategy.post(FAILURE, f"{type(exception).__name__}: {exception}")

    def call(self, event: str) -> None:
        """Tell the callbacks of an event."""
        for callback in self.callbacks:
            getattr(callback, event)(self)
