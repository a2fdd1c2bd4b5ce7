"""Checks that come before anything is paid for; each message names the value, the choices and the way out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.callbacks.accumulation import GradientAccumulationScheduler
from engine.callbacks.base import Callback
from engine.checkpoint.writer import Best
from engine.plan.schedule import check_accumulation, check_lr_rule, make_schedule
from engine.plan.windows import Plan
from engine.update.precision import check_precision
from strategies import Strategy

SWITCHES = (
    "compile_model",
    "fused_optimizer",
    "shuffle",
    "spread_windows",
    "resume_with_changes",
    "skip_nonfinite_updates",
    "persistent_workers",
    "prefetch_to_device",
    "deterministic",
    "progress",
)
"""The trainer's arguments that are on or off."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number (no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}.")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the trainer's arguments one by one. Raises ValueError."""
    check_accumulation(settings["accumulate_grad_batches"])
    check_count("micro_batch_size", settings["micro_batch_size"])
    check_count("seed", settings["seed"], least=0)
    check_count("num_workers", settings["num_workers"], least=0)
    for name in (
        "effective_batch_size",
        "max_epochs",
        "max_updates",
        "validate_every_n_epochs",
        "validate_every_n_updates",
        "max_validation_samples",
    ):
        if settings[name] is not None:
            check_count(name, settings[name])
    if settings["max_epochs"] is None and settings["max_updates"] is None:
        raise ValueError("neither max_epochs nor max_updates is given: say where the run ends, as in max_epochs=10.")
    for name in ("max_time", "gradient_clip_norm", "save_every_n_minutes"):
        value = settings[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf
        ):
            raise ValueError(f"{name}={value!r}: give a positive number, or None.")
    for name in SWITCHES:
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name}={settings[name]!r}: give True or False.")
    for name in ("pin_memory", "tf32"):
        if settings[name] is not None and not isinstance(settings[name], bool):
            raise ValueError(f"{name}={settings[name]!r}: give True or False, or None.")
    check_lr_rule(settings["lr_rule"], settings["lr_reference_batch"])
    check_precision(settings["precision"])
    check_keeping(settings)


def the_callbacks(callbacks: Any) -> list[Callback]:
    """Return one callback, or a list or tuple of them, as a list. Raises ValueError for anything else."""
    if callbacks is None:
        return []
    listed = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in listed:
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks: {callback!r} is no Callback. Give an object of one, or a list of them.")
    return listed


def the_scheduler(
    settings: Mapping[str, Any], callbacks: Iterable[Callback], strategy: Strategy
) -> GradientAccumulationScheduler | None:
    """Return the scheduler, if there is one. Raises ValueError where more than one thing says how long a window is."""
    K, batch = settings["accumulate_grad_batches"], settings["effective_batch_size"]
    schedulers = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    given = [f"accumulate_grad_batches={K}"] if K != 1 else []
    given += [f"effective_batch_size={batch}"] if batch is not None else []
    given += [f"GradientAccumulationScheduler({s.scheduling})" for s in schedulers]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} both say how long a window is: keep one (accumulate_grad_batches=1 says nothing)."
        )
    scheduler = schedulers[0] if schedulers else None
    scheduling = scheduler.scheduling if scheduler else {0: K}
    schedule = make_schedule(settings["micro_batch_size"], strategy.effective_batch, scheduling, "epoch", batch)
    check_windows({stage.first: stage.accumulate_grad_batches for stage in schedule.stages}, strategy)
    return scheduler


def check_windows(scheduling: Mapping[int, int], strategy: Strategy) -> None:
    """Refuse a changing K where the strategy cannot change it, and any but that it was built for. Raises ValueError."""
    if len(set(scheduling.values())) > 1 and not strategy.supports_variable_windows:
        raise ValueError(
            f"strategy {strategy.name!r} does not support variable windows, but the schedule "
            f"{dict(scheduling)} changes K: use accumulate_grad_batches=K, or another strategy."
        )
    built = strategy.micro_batches
    if built is not None and (others := {*scheduling.values()} - {built}):
        K = min(others)
        raise ValueError(
            f"strategy {strategy.name!r} was built for windows of {built} micro-batches (micro_batches={built}), but "
            f"those of this run have {K}: use accumulate_grad_batches={built}, or build it with micro_batches={K}."
        )


def check_stream(data: object, strategy: Strategy) -> None:
    """Refuse ready micro-batches where several processes need the same ones. Raises ValueError."""
    if strategy.processes > strategy.data_parallel_size:
        raise ValueError(
            f"strategy {strategy.name!r}: {strategy.processes // strategy.data_parallel_size} processes share each "
            f"micro-batch, but data of type {type(data).__name__} gives each process its own. Return a map-style "
            "dataset (with __getitem__ and __len__)."
        )


def check_equal_windows(strategy: Strategy, plan: Plan | None, N: int, spread: bool) -> None:
    """Refuse windows in which processes have different numbers of micro-batches, where forward communicates.

    Called when the model is prepared. Raises ValueError.
    """
    if not strategy.needs_equal_windows:
        return
    P, what = strategy.data_parallel_size, "the model has a SyncBatchNorm, which communicates in every forward"
    if plan is None:
        raise ValueError(
            f"{what}, and ready micro-batches may run out on one process before another: use a norm that does not "
            "(GroupNorm, LayerNorm, BatchNorm), or map-style data."
        )
    for epoch, window in plan.all_windows():
        if (pieces := window.count(N, P, spread)) % P:
            raise ValueError(
                f"{what}, but in epoch {epoch} an update of {window.samples} samples is {pieces} micro-batches on {P} "
                "processes: use spread_windows=True (with at least as many samples as processes), a number of samples "
                "that divides, or a norm that does not communicate."
            )


def check_dataset(samples: int, micro_batch_size: int, epoch_samples: int) -> None:
    """Check the sizes of a map-style dataset and of its order. Raises ValueError."""
    if samples == 0 or epoch_samples == 0:
        raise ValueError("train_data() has no samples: there is nothing to train on.")
    if micro_batch_size > epoch_samples:
        raise ValueError(
            f"micro_batch_size={micro_batch_size} is more than the {epoch_samples} samples of an epoch: "
            f"use {epoch_samples} or less."
        )


def check_model(model: object) -> None:
    """Refuse what cannot be trained: no module, nothing that requires grad, sparse gradients. Raises ValueError."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"configure_model() returned {type(model).__name__}: return a torch.nn.Module.")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("the model has lazy parameters: run it once on a batch in configure_model().")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter that requires grad: there is nothing to train.")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            where = f"module {name!r}" if name else "the model"
            raise ValueError(f"{where} has sparse gradients, which are not supported: use sparse=False.")


def batch_norms(model: nn.Module) -> int:
    """Return how many layers of `model` normalise over a micro-batch, which accumulation cannot make larger."""
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check_optimizer(configured: object, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
    """Return the optimizer and the LR scheduler, if any, of what a task configured.

    Raises ValueError for what is none, for one that wants more than `step()`, and for parameters that no strategy
    would reduce.
    """
    optimizer: object
    lr_scheduler: object
    is_pair = isinstance(configured, tuple) and len(configured) == 2
    optimizer, lr_scheduler = configured if is_pair else (configured, None)  # type: ignore[misc]
    if not isinstance(optimizer, Optimizer) or not isinstance(lr_scheduler, LRScheduler | None):
        raise ValueError(
            f"configure_optimizer() returned {configured!r}: return an optimizer, or an optimizer and an LR scheduler."
        )
    for unwanted in (optimizer, lr_scheduler):
        if isinstance(unwanted, LBFGS | ReduceLROnPlateau):
            instead = "the callback PlateauLR" if isinstance(unwanted, ReduceLROnPlateau) else "another"
            raise ValueError(f"{type(unwanted).__name__} wants more than step() once per update: use {instead}.")
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds a parameter that is not the model's: it would not be reduced over the processes. "
            "Make it part of the module that configure_model() returns."
        )
    return optimizer, lr_scheduler


def check_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse sparse gradients that no module announced; called at the first update. Raises ValueError."""
    for name, parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(f"parameter {name!r} has a sparse gradient, which is not supported: use sparse=False.")


def check_configurations_agree(strategy: Strategy, configuration: Mapping[str, Any]) -> None:
    """Compare the configurations of all processes. Raises ValueError on all of them, naming what differs and where."""
    everyone = strategy.gather({name: str(value) for name, value in configuration.items()})
    differences = [
        f"{name} is " + ", ".join(f"{row.get(name)} on process {rank}" for rank, row in enumerate(everyone))
        for name in dict.fromkeys(name for row in everyone for name in row)
        if len({row.get(name) for row in everyone}) > 1
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"processes were started with different configurations: {'; '.join(differences[:5])}{more}. "
            "Give all of them the same."
        )


def check_keeping(settings: Mapping[str, Any]) -> None:
    """Check what is said of checkpoints. Raises ValueError."""
    for name in ("save_every_n_updates", "stop_after_n_skipped"):
        if settings[name] is not None:
            check_count(name, settings[name])
    check_count("keep_last_checkpoints", settings["keep_last_checkpoints"])
    if settings["keep_best"] is not None:
        Best(settings["keep_best"])
    if settings["run_dir"] is None and (settings["save_every_n_updates"] is not None or settings["keep_best"]):
        raise ValueError("save_every_n_updates and keep_best need a run_dir to save into: name a folder.")
    run_dir, resume, weights = settings["run_dir"], settings["resume"], settings["weights"]
    if run_dir is not None and not _is_path(run_dir):
        raise ValueError(f"run_dir={run_dir!r}: name a folder, or None to write nothing.")
    if resume not in ("auto", "never") and not (_is_path(resume) and Path(resume).exists()):
        raise ValueError(f"resume={resume!r}: there is no such checkpoint; give its path, auto or never.")
    if weights is not None and not (_is_path(weights) and Path(weights).is_file()):
        raise ValueError(f"weights={weights!r}: there is no such file; give a .safetensors file.")


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and str(value) != ""
