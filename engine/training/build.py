"""Builds what a run needs, in the order of its cost, and checks each part as soon as it is there."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from engine.callbacks.accumulation import Scheduling
from engine.callbacks.base import Callback
from engine.callbacks.noise_scale import NoiseScale
from engine.checkpoint import snapshot
from engine.checkpoint.base import Base
from engine.checkpoint.buffers import UnsavedBuffers
from engine.checkpoint.checkpointer import Checkpointer
from engine.checkpoint.find import Checkpoint
from engine.data.checks import can_redo, check_equal_windows, check_windows
from engine.data.counting import counts_terms
from engine.data.prefetch import OnHost, Prefetch
from engine.data.sources import make_plan, make_source
from engine.data.window import Loading, Source
from engine.errors import UserError
from engine.plan.schedule import Schedule, make_schedule, with_lr_rule
from engine.plan.windows import Plan
from engine.seeds import seed_everything
from engine.settings import AUTO, Settings, class_path
from engine.signals import Signals
from engine.task import Task
from engine.training.validation import Validation
from engine.update.model_checks import check_model, check_optimizer
from engine.update.precision import autocast
from engine.update.replay import ReplayUpdater
from engine.update.terms import JoinedTerms
from engine.update.timing import NO_TIMER, UpdateTimer
from engine.update.updater import LossOf, UpdateOptions, Updater
from engine.window_task import WindowTask
from strategies import Strategy

log = logging.getLogger("tally")


@dataclass
class Layout:
    """The run as arithmetic: its stages and windows on the current processes, and its training data."""

    N: int
    schedule: Schedule
    plan: Plan | None  # every window of the run, for map-style data
    data: Any
    total_updates: int | None  # the exact number of updates; None for a stream that is bounded by epochs


@dataclass(frozen=True)
class Run:
    """A run that is built: what is trained, by what, on what."""

    layout: Layout
    parts: snapshot.RunParts
    source: Source
    loss_of: LossOf
    validation: Validation | None

    def cut(self, N: int) -> None:
        """Make micro-batches of N from now on; the samples of each window stay, and K follows, but for a stream."""
        layout = self.layout
        if layout.plan is not None:
            layout.N, layout.schedule = N, layout.schedule.cut(N, self.parts.strategy.effective_batch)
            layout.plan = replace(layout.plan, schedule=layout.schedule)
            if self.validation is not None:
                self.validation.cut(N)
        self.source.cut(N, layout.plan)


def build(
    task: Task,
    settings: Settings,
    scheduling: Scheduling,
    strategy: Strategy,
    callbacks: Sequence[Callback],
    signals: Signals,
    checkpoint: Checkpoint | None,
    configuration: Mapping[str, Any],
    N: int,
) -> Run:
    """Build data, model, optimizer and updater of `task`. Raises UserError for what cannot be trained."""
    layout = lay_out(task, settings, scheduling, strategy, N, checkpoint)
    held = OnHost(task) if counts_terms(task) else Prefetch(strategy, task) if settings.prefetch_to_device else None
    workers = settings.num_workers, settings.pin_memory, settings.persistent_workers
    loading = Loading(task, strategy, settings.seed, held, settings.shuffle, settings.spread_windows, *workers)
    source = make_source(layout.data, layout.schedule, layout.plan, N, loading)
    validation = make_validation(task, settings, strategy, N=N)
    if settings.keep_best and validation is None:
        raise UserError(f"keep_best={settings.keep_best!r}: expected validation data. Return it in validation_data().")
    if validation is not None and validation.samples == 0:
        raise UserError("validation_data() has no samples: expected at least one. Return None to validate on nothing.")
    model = make_model(task, settings.seed)
    _load_weights(model, settings, checkpoint)
    if checkpoint is not None:
        checkpoint.complete(model)
    saved, left_out = ({}, None) if checkpoint is None else (checkpoint.model, checkpoint["left_out"])
    base = None if settings.save_frozen else Base(model, saved, left_out, strategy)
    if settings.compile_model:
        compile_in_place(model)
    is_recorded = bool(callbacks or settings.loggers or settings.run_dir is not None)
    more = {"the names of task.validation_metrics": [*task.validation_metrics], "whether anything listens": is_recorded}
    if layout.plan is not None and (order := task.order(0)) is not None:
        more["the beginning of order(0)"] = [*order[:8]]
    _check_agreement(strategy, {**configuration, **more}, layout, model)
    strategy.runs_twice = isinstance(task, WindowTask)
    prepared = strategy.prepare(model)
    check_equal_windows(strategy, layout.plan, N, settings.spread_windows)
    optimizer, lr_scheduler = check_optimizer(task.configure_optimizer(model), model)
    strategy.prepare_optimizer(optimizer)
    clip_norm, skips, seed = settings.gradient_clip_norm, settings.skip_nonfinite_updates, settings.seed
    noise = next((c.every_n_updates for c in callbacks if isinstance(c, NoiseScale)), None)
    options = UpdateOptions(clip_norm, skips, settings.precision, seed, is_recorded, layout.total_updates, noise)
    heeded = signals if settings.run_dir is not None else None
    timer = UpdateTimer(strategy) if is_recorded else NO_TIMER
    updating = strategy, prepared, optimizer, lr_scheduler, options, heeded, timer
    forward: Callable[..., Any] = task.loss
    updater: Updater
    if isinstance(task, WindowTask):
        forward, updater = task.outputs, ReplayUpdater(task.window_loss, task.keeps_batches_on_host, *updating)
    else:
        updater = Updater(*updating)
    if counts_terms(task):
        updater.terms = JoinedTerms(updater.exchange, strategy, task.weights)
    runs_by_place = layout.plan is None and (isinstance(task, WindowTask) or counts_terms(task))
    if can_redo(strategy) and source.can_be_cut and not runs_by_place:
        updater.allow_redo()
    task._log_entries = updater.logged
    identity = snapshot.run_identity(settings, scheduling, layout.plan, optimizer, lr_scheduler)
    state = strategy, model, UnsavedBuffers(model), optimizer, lr_scheduler, layout.schedule, updater
    parts = snapshot.RunParts(*state, callbacks, identity, base)
    return Run(layout, parts, source, autocast(forward, settings.precision, strategy.device.type), validation)


def hyperparameters(task: Task, model: nn.Module, plan: Plan | None) -> dict[str, Any]:
    """Return what an experiment tracker lists beside the settings: the task's own numbers and texts, and totals."""
    plain = {n: value for n, value in vars(task).items() if isinstance(value, int | float | str)}
    own = {f"task.{name}": value for name, value in plain.items() if len(str(value)) < 200}
    totals = {"total_updates": task.total_updates, "samples_per_epoch": plan and plan.samples}
    return {"task": class_path(task), **own, **totals, "parameters": sum(p.numel() for p in model.parameters())}


def prepare_data(task: Task, strategy: Strategy) -> None:
    """Let one process of each host prepare the data, while the others wait."""
    if strategy.local_rank == 0:
        task.prepare_data()
    strategy.barrier()


def known_micro_batch_size(settings: Settings, scheduling: Scheduling, checkpoint: Checkpoint | None) -> int:
    """Return the N that a run resumes with: it may have become smaller; else that of the settings, 0 for "auto"."""
    is_same = checkpoint is not None and _has_same_windows(checkpoint, snapshot.window_identity(settings, scheduling))
    if checkpoint is not None and is_same and (N := int(checkpoint["run"]["micro_batch_size"])):
        return N
    return 0 if settings.micro_batch_size == AUTO else settings.N


def lay_out(
    task: Task,
    settings: Settings,
    scheduling: Scheduling,
    strategy: Strategy,
    N: int,
    checkpoint: Checkpoint | None = None,
) -> Layout:
    """Cut the run of `task` into stages and windows. Raises UserError for data that they do not fit."""
    seed_everything(settings.seed)
    B = settings.effective_batch_size
    schedule = make_schedule(settings.N, strategy.effective_batch, scheduling.by_start, scheduling.unit, B)
    schedule = schedule.cut(N, strategy.effective_batch)
    if checkpoint is not None and _has_same_windows(checkpoint, snapshot.window_identity(settings, scheduling)):
        asked, schedule = schedule, snapshot.saved_schedule(checkpoint, N, strategy)
        if strategy.rank == 0 and schedule != asked:
            Ks = [", ".join(str(stage.accumulate_grad_batches) for stage in s.stages) for s in (schedule, asked)]
            log.warning("the effective batch stays that of the checkpoint: K is %s on these processes, not %s.", *Ks)
        check_windows({stage.first: stage.accumulate_grad_batches for stage in schedule.stages}, strategy)
    schedule = with_lr_rule(schedule, settings.lr_rule, settings.lr_reference_batch)
    data = task.train_data()
    plan = make_plan(data, task, schedule, N, settings.max_epochs, settings.max_updates, B)
    total = settings.max_updates if settings.max_epochs is None else None
    task.total_updates = plan.updates if plan is not None else total
    return Layout(N, schedule, plan, data, task.total_updates)


def _has_same_windows(checkpoint: Checkpoint, windows: Mapping[str, str]) -> bool:
    """Whether the settings say the same of windows as those of a checkpoint: its effective batches then stay."""
    return all(checkpoint["identity"].get(name) == text for name, text in windows.items())


def make_validation(
    task: Task, settings: Settings, strategy: Strategy, source: str = "validation_data", N: int = 0
) -> Validation | None:
    """Return the validation of `task` on what its method `source` returns; None for None."""
    data = getattr(task, source)()
    limit = settings.max_validation_samples if source == "validation_data" else None
    return None if data is None else Validation(data, task, strategy, settings, limit, N)


def means(task: Task, hook: str, model: nn.Module, settings: Settings, strategy: Strategy, N: int) -> dict[str, float]:
    """Return the means of `task.evaluate` over what its method `hook` returns. Raises UserError for None."""
    validation = make_validation(task, settings, strategy, hook, N)
    if validation is None:
        raise UserError(f"{type(task).__name__}.{hook}() returned None. Return data to evaluate on.")
    return validation.run(model) or {}


def make_model(task: Task, seed: int) -> nn.Module:
    """Make the model, from the run's seed. Raises UserError for one that cannot be trained."""
    seed_everything(seed)
    model = task.configure_model()
    check_model(model)
    return model


def check_compiles(compile_model: bool, strategy: Strategy) -> None:
    """Refuse a strategy under which nothing would be compiled. Raises UserError."""
    if compile_model and not strategy.compiles_in_place:
        raise UserError(
            f"compile_model=True: strategy {strategy.name!r} calls copies or parts of the model, and nothing "
            "would be compiled: compile its parts in configure_model(), or use single or ddp."
        )


def compile_in_place(model: nn.Module) -> None:
    """Let calls of `model` run what torch's default backend makes of it."""
    import torch._dynamo  # slow to import: only here

    # nothing of a torch class (`nn.Sequential`) would be compiled: torch never traces that frame unwrapped
    with torch._dynamo.config.patch(wrap_top_frame=True):
        model.compile()


def first_model(task: Task, settings: Settings, strategy: Strategy, callbacks: Sequence[Callback]) -> nn.Module:
    """Return the model that a run would start from, and restore callbacks. Raises UserError without a checkpoint."""
    checkpoint = Checkpointer(settings, strategy, Signals()).find()
    if checkpoint is None and settings.weights is None and settings.run_dir is not None and settings.resume == "auto":
        way_out = "Use weights=FILE, or resume='never' for a new model."
        raise UserError(f"run_dir={settings.run_dir!r}: expected a run with a checkpoint. {way_out}")
    seed_everything(settings.seed)
    model = task.configure_model().to(strategy.device)
    _load_weights(model, settings, checkpoint)
    if checkpoint is not None:
        snapshot.load_checkpoint(model, checkpoint, strategy.device)
        snapshot.restore_callbacks(callbacks, checkpoint["callbacks"])
    return model


def _load_weights(model: nn.Module, settings: Settings, checkpoint: Checkpoint | None) -> None:
    if settings.weights is not None and (checkpoint is None or checkpoint["left_out"]):
        snapshot.load_weights(model, Path(settings.weights))


def _check_agreement(strategy: Strategy, configuration: Mapping[str, Any], layout: Layout, model: nn.Module) -> None:
    """Compare what all processes are about to train. Raises UserError on all of them, naming what differs and where."""
    facts = {
        **configuration,
        "the number of training samples": layout.plan.samples if layout.plan else None,
        **{f"the shape of {name}": tuple(p.shape) for name, p in model.named_parameters()},
    }
    everyone = strategy.compare({name: str(value) for name, value in facts.items()})
    differences = [
        f"{name} is " + ", ".join(f"{row.get(name)} on process {rank}" for rank, row in enumerate(everyone))
        for name in dict.fromkeys(name for row in everyone for name in row)
        if len({row.get(name) for row in everyone}) > 1
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"processes were started with different configurations: {'; '.join(differences[:5])}{more}. "
            "Give all of them the same."
        )
