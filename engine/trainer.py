"""The trainer: checks its arguments, builds what a run needs, and runs its epochs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from engine.callbacks import Callback, Progress
from engine.checks import (
    check_configurations_agree,
    check_equal_windows,
    check_model,
    check_optimizer,
    check_settings,
    the_scheduler,
)
from engine.data import make_plan, make_source
from engine.evaluation import Evaluation
from engine.loop import Loop, LoopOptions
from engine.map_source import LoaderOptions
from engine.plan import Plan
from engine.precision import autocast, numerics
from engine.randomness import seed_everything
from engine.records import Records
from engine.run_folder import Logger, RunFolder
from engine.schedule import Schedule, make_schedule
from engine.summary import summarize
from engine.task import Task
from engine.window import Window
from strategies import Strategy, resolve


class Trainer:
    """Trains a `Task` on a `Strategy`: one exact update per window of K micro-batches of N samples on P processes.

    Args:
        strategy: "auto", "single", "dp", "ddp", or a `Strategy`.
        micro_batch_size: N, samples per micro-batch of map-style data. Ready micro-batches come in their own sizes.
        accumulate_grad_batches: K, micro-batches per process and window.
        effective_batch_size: samples per update over all processes; K follows from P. Instead of K.
        max_epochs: where the run ends, in epochs; this or `max_updates` is needed.
        max_updates: where the run ends, in updates; with both, whichever comes first.
        max_time: seconds of training after which the run ends with the update that is under way.
        gradient_clip_norm: clips the 2-norm of an update's whole gradient.
        precision: "fp32", "bf16" or "fp16" (autocast); None keeps the model's own dtype.
        seed: of the model's parameters, the data order, dropout and augmentation.
        shuffle: a new global order each epoch; `Task.order` gives another one.
        spread_windows: cut each window into as many pieces of like size for all processes, so that none waits for
            another in a window that does not divide; dropout and augmentation then depend on P (map-style data).
        callbacks: one `Callback` or several.
        loggers: objects with `log(record)` and `close()`, used on process 0.
        run_dir: a folder to write the run into; nothing is written without it.
        validate_every_n_epochs: evaluate the validation data after each n-th epoch, and at the end; None: only then.
        validate_every_n_updates: and after each n-th update.
        max_validation_samples: evaluate at most so many (map-style data).
        skip_nonfinite_updates: look at each gradient norm, and skip the update on all processes if it is not finite.
        num_workers: as in torch's DataLoader (map-style data).
        pin_memory: likewise; None pins for CUDA.
        persistent_workers: likewise.
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
        gradient_clip_norm: float | None = None,
        precision: str | None = None,
        seed: int = 0,
        shuffle: bool = True,
        spread_windows: bool = False,
        callbacks: Callback | Sequence[Callback] | None = None,
        loggers: Logger | Sequence[Logger] | None = None,
        run_dir: str | None = None,
        validate_every_n_epochs: int | None = 1,
        validate_every_n_updates: int | None = None,
        max_validation_samples: int | None = None,
        skip_nonfinite_updates: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        deterministic: bool = False,
        tf32: bool | None = None,
        progress: bool = False,
    ) -> None:
        arguments = dict(locals())
        del arguments["self"]
        check_settings(arguments)
        self.settings = arguments
        self.strategy = resolve(strategy)
        self.callbacks = _as_list(callbacks) + ([Progress()] if progress else [])
        self._loggers: list[Logger] = _as_list(loggers)
        self._scheduler = the_scheduler(arguments, self.callbacks, self.strategy)
        self._loader = LoaderOptions(num_workers, pin_memory, persistent_workers)
        self.epoch = 0
        """The current epoch, from 0."""
        self.update = 0
        """Updates made since the start, skipped ones included."""
        self.samples = 0
        """Samples trained on since the start, over all processes."""
        self.skipped = 0
        """Updates skipped since the start."""
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
        self.run: RunFolder | None = None
        self._records = Records([])
        self._stops = False

    def fit(self, task: Task) -> None:
        """Train `task` from its start to where the run ends.

        Raises what the task raises, ValueError for what cannot be trained, and FileExistsError for a `run_dir` that
        is taken.
        """
        with numerics(self.settings["deterministic"], self.settings["tf32"]):
            try:
                self.strategy.setup()
                self._build(task)
                self._call("on_fit_start")
                self._run_epochs()
                self._finish()
            except BaseException as exception:
                for callback in self.callbacks:
                    callback.on_exception(self, exception)
                raise
            finally:
                self._records.close()
                for part in ("_loop", "_source", "_validation"):  # hooks and workers end with the run
                    vars(self).pop(part, None)
                self.strategy.teardown()

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
            self.metrics = evaluation.run(self.model)
            return self.metrics
        finally:
            self.strategy.teardown()

    @property
    def total_updates(self) -> int | None:
        """The exact number of updates of the run; None for a stream that is bounded by epochs."""
        if self.plan is not None:
            return self.plan.updates
        return self.settings["max_updates"] if self.settings["max_epochs"] is None else None

    def stop(self) -> None:
        """End the run: at once in one process; with several, all together after the next update."""
        self._stops = True

    @property
    def configuration(self) -> dict[str, Any]:
        """What was asked for, as JSON values: the settings, and the strategy and callbacks by class."""
        stated = {name: v for name, v in self.settings.items() if name not in ("loggers", "run_dir", "progress")}
        stated["strategy"] = _class_path(self.strategy)
        stated["callbacks"] = [_class_path(callback) for callback in self.callbacks]
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

    def _build(self, task: Task) -> None:
        """Build data, model and optimizer, and check each as soon as it is there."""
        strategy, seed = self.strategy, self.settings["seed"]
        self.task = task
        self.epoch = self.update = self.samples = self.skipped = 0
        self.record, self.metrics, self._validated, self._stops = {}, {}, 0, False
        self.run, self._records = None, Records([])
        self._prepare_data(task)
        seed_everything(seed)
        N, scheduler = self.micro_batch_size, self._scheduler
        scheduling = scheduler.scheduling if scheduler else {0: self.settings["accumulate_grad_batches"]}
        unit, B = scheduler.unit if scheduler else "epoch", self.settings["effective_batch_size"]
        self.schedule = make_schedule(N, strategy.effective_batch, scheduling, unit, B)
        data, bounds = task.train_data(), (self.settings["max_epochs"], self.settings["max_updates"])
        self.plan = make_plan(data, task, self.schedule, N, *bounds, B)
        cut = seed, self.settings["shuffle"], self._loader, self.settings["spread_windows"]
        self._source = make_source(data, task, strategy, self.schedule, self.plan, N, *cut)
        self._validation = self._evaluation(task)
        task.total_updates = self.total_updates
        seed_everything(seed)
        self.model = task.configure_model()
        check_model(self.model)
        measures = bool(self.callbacks or self._loggers or self.settings["run_dir"] is not None)
        check_configurations_agree(
            strategy,
            {
                **self.configuration,
                "the number of training samples": self.plan.samples if self.plan else None,
                "the model": {name: tuple(p.shape) for name, p in self.model.named_parameters()},
                "whether anything listens": measures,
            },
        )
        prepared = strategy.prepare(self.model)
        check_equal_windows(strategy, self.plan, N, self.settings["spread_windows"])
        self.optimizer, lr_scheduler = check_optimizer(task.configure_optimizer(self.model), self.model)
        kept = ("gradient_clip_norm", "skip_nonfinite_updates", "precision", "seed")
        options = LoopOptions(**{name: self.settings[name] for name in kept}, measures=measures)
        self._compute = autocast(task.loss, self.settings["precision"], strategy.device.type)
        self._loop = Loop(strategy, prepared, self.optimizer, lr_scheduler, options)
        if strategy.rank == 0:
            if self.settings["run_dir"] is not None:
                self.run = RunFolder(self.settings["run_dir"])
                self.run.write("config.json", {"task": _class_path(task), **self.configuration})
            self._records = Records([*self._loggers, *([self.run] if self.run else [])])

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
        return Evaluation(data, task, self.strategy, self.micro_batch_size, self._loader, precision, limit)

    # Running

    def _run_epochs(self) -> None:
        max_epochs = self.settings["max_epochs"]
        self._started = time.perf_counter()
        self._records.restart_clock()
        over = False
        while not (over or self._stops_alone) and (max_epochs is None or self.epoch < max_epochs):
            self._call("on_epoch_start")
            for window in self._source.windows(self.epoch, self.update):
                over = self._run_update(window)
                if over:
                    break
            self._loop.check_replicas(self.update)
            every = self.settings["validate_every_n_epochs"]
            if every is not None and (self.epoch + 1) % every == 0:
                self._validate()
            self._call("on_epoch_end")
            if not over:
                self.epoch += 1
        self._validate()

    def _run_update(self, window: Window) -> bool:
        """Make one update, tell of it, and return whether the run is over."""
        max_time, max_updates = self.settings["max_time"], self.settings["max_updates"]
        late = max_time is not None and time.perf_counter() - self._started > max_time
        outcome = self._loop.run_update(self._compute, window, self.epoch, self.update, self._stops or late)
        self.update += 1
        self.samples += outcome.samples
        self.skipped += outcome.skipped
        if self._loop.options.measures:
            place = {"update": self.update, "epoch": self.epoch, "samples": self.samples, "skipped": self.skipped}
            K = window.stage.accumulate_grad_batches
            self.record = self._records.of_update(place, outcome, self._loop.lr, K)
            self._call("on_update_end")
        every = self.settings["validate_every_n_updates"]
        if every is not None and self.update % every == 0:
            self._validate()
        return outcome.stop or self._stops_alone or self.update == max_updates

    @property
    def _stops_alone(self) -> bool:
        """Whether this process wants to stop and need not ask another."""
        return self._stops and self.strategy.data_parallel_size == 1

    def _validate(self) -> None:
        if self._validation is None or self._validated == self.update:
            return
        self._validated = self.update
        self.metrics = self._validation.run(self.model)
        self._records.of_validation(self.update, self.epoch, self.metrics)
        self._call("on_validation_end")
        self._records.restart_clock()

    def _finish(self) -> None:
        self.strategy.synchronize_buffers(self.model)
        if self.settings["run_dir"] is not None:
            weights = self.strategy.state_dict()["model"]
            if self.run is not None:
                self.run.write("summary.json", summarize(self, time.perf_counter() - self._started))
                self.run.save_weights(weights)
        self._call("on_fit_end")

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)


def _as_list(values: Any) -> list[Any]:
    if values is None:
        return []
    return list(values) if isinstance(values, Sequence) else [values]


def _class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
