"""Takes a snapshot of a run at a boundary, and restores a run from one."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.callbacks.accumulation import Scheduling
from engine.callbacks.base import Callback
from engine.checkpoint import tree
from engine.checkpoint.base import Base, with_base
from engine.checkpoint.buffers import UnsavedBuffers, take_shapes
from engine.checkpoint.find import Checkpoint
from engine.errors import CheckpointError, UserError, describe
from engine.optimizers import evaluated
from engine.plan.schedule import Schedule, differences, solve
from engine.plan.windows import Plan
from engine.records.run_folder import LEFT_OUT
from engine.settings import OPTIONS, Settings, class_path
from engine.state import RunState
from engine.update.updater import Updater
from strategies import Strategy, parts_of, user_name, with_modes

log = logging.getLogger("tally")


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that have a state, and the texts that identify it."""

    strategy: Strategy
    model: nn.Module  # the user's own, not the prepared one
    unsaved_buffers: UnsavedBuffers
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    schedule: Schedule
    updater: Updater
    callbacks: Sequence[Callback]
    identity: Mapping[str, str]
    base: Base | None = None  # the frozen parameters, if they are left out of what is saved


def window_identity(settings: Settings, scheduling: Scheduling) -> dict[str, str]:
    """Return, as texts, the settings that say how long a window is."""
    stated = {name: str(getattr(settings, name)) for name, option in OPTIONS.items() if option.sets_windows}
    return {**stated, "scheduling": str(scheduling.by_start), "scheduling_unit": scheduling.unit}


def run_identity(
    settings: Settings,
    scheduling: Scheduling,
    plan: Plan | None,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
) -> dict[str, str]:
    """Return, as texts, what must be the same in a resumed run: neither P nor the end of the run is part of it."""
    return {
        **{name: str(getattr(settings, name)) for name, option in OPTIONS.items() if option.identity},
        **window_identity(settings, scheduling),
        "the number of training samples": str(plan.samples if plan else None),
        "the optimizer": " and ".join(type(part).__name__ for part in parts_of(optimizer)),
        "the LR scheduler": type(lr_scheduler).__name__,
    }


def saved_schedule(checkpoint: Checkpoint, N: int, strategy: Strategy) -> Schedule:
    """Return the schedule that keeps each stage's effective batch, solved for the current processes."""
    stages = {int(first): int(B) for first, B in checkpoint["schedule"]["effective_batches"].items()}
    return solve(stages, N, strategy.effective_batch, checkpoint["schedule"]["unit"])


def snapshot(state: RunState, parts: RunParts) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return (model, state by topic), copied. All processes call it; process 0 has the whole."""
    strategy, host_rng, buffers = parts.strategy, parts.updater.host_rng, parts.unsaved_buffers.changed()
    left_out = None if parts.base is None else parts.base.digests()
    strategy.left_out = left_out or ()
    whole: dict[str, Any] = {"model": {}, "optimizer": {}}
    if strategy.rank == 0 or not strategy.holds_all:
        whole = strategy.state_dict(parts.optimizer)
    if whole["model"] and with_modes(parts.optimizer):
        whole["optimizer"]["trained"] = whole["model"]
        with evaluated(parts.optimizer):
            whole["model"] = strategy.state_dict()["model"]
    if not strategy.holds_all:
        buffers = {name: value for local in strategy.collect(buffers)[::-1] for name, value in local.items()}
    rest = {
        **_local_state(state, parts),
        "positions": None if state.position is None else strategy.collect(state.position),
        "host_rng": strategy.collect(None if host_rng is None else host_rng.state()),
        "buffers": buffers,
        "left_out": left_out,
    }
    return whole["model"], {"optimizer": whole["optimizer"], **tree.copied(rest)}


def _local_state(state: RunState, parts: RunParts) -> dict[str, Any]:
    """Return the state that needs no other process."""
    return {
        "run": state.state_dict(),
        "frozen": [user_name(name) for name, p in parts.model.named_parameters() if not p.requires_grad],
        "schedule": parts.schedule.state_dict(),
        "identity": dict(parts.identity),
        "updater": parts.updater.state_dict(),
        "lr_scheduler": None if parts.lr_scheduler is None else parts.lr_scheduler.state_dict(),
        "callbacks": [[class_path(callback), callback.state_dict()] for callback in parts.callbacks],
    }


def check_snapshot(state: RunState, parts: RunParts) -> None:
    """Raise UserError, on all processes, for state that `snapshot` could not save as it is now. Nothing is copied."""
    problem = None
    try:
        if other := [key for key in parts.optimizer.state if not isinstance(key, Tensor)]:
            raise UserError(f"the optimizer's state has key {other[0]!r}: expected parameters. Keep it in a group.")
        tree.check_saveable(
            {
                "model": parts.model.state_dict(),
                "optimizer": parts.optimizer.state_dict(),
                "position": state.position,
                "buffers": parts.unsaved_buffers.changed(),
                **_local_state(state, parts),
            }
        )
    except UserError as error:
        problem = str(error)
    if problems := [text for text in parts.strategy.compare(problem) if text is not None]:
        raise UserError(problems[0])


def restore(checkpoint: Checkpoint, parts: RunParts, allows_changes: bool) -> RunState:
    """Load a checkpoint into the parts of a run and return its state. Raises CheckpointError if it does not fit."""
    strategy, saved = parts.strategy, checkpoint["identity"]
    try:
        _compare(parts, checkpoint, allows_changes)
        take_shapes(parts.model, checkpoint.model, strategy.device)
        check_model_state(strategy.state_dict()["model"], checkpoint.model, checkpoint.path)
        parts.unsaved_buffers.load(checkpoint["buffers"], strategy.device)
        for name, parameter in parts.model.named_parameters():  # a callback may have changed it
            parameter.requires_grad_(user_name(name) not in checkpoint["frozen"])
        unchanged = {name for name, text in parts.identity.items() if saved.get(name) == text}
        if "the optimizer" in unchanged:
            model = checkpoint["optimizer"].get("trained", checkpoint.model)
            strategy.load_state_dict({"model": model, "optimizer": checkpoint["optimizer"]}, parts.optimizer)
        else:
            strategy.load_state_dict({"model": checkpoint.model})
        if parts.lr_scheduler is not None and "the LR scheduler" in unchanged:
            parts.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        parts.updater.load_state_dict(checkpoint["updater"], "precision" in unchanged)
        if parts.updater.host_rng is not None:
            parts.updater.host_rng.load_state(checkpoint["host_rng"], strategy.rank, strategy.processes)
        restore_callbacks(parts.callbacks, checkpoint["callbacks"])
        positions = checkpoint["positions"]
        return RunState.of(checkpoint["run"], positions and positions[strategy.data_parallel_rank % len(positions)])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not fit this run: {describe(error)}") from error


def restore_callbacks(callbacks: Sequence[Callback], saved: Sequence[Any]) -> None:
    """Give each saved state to the first callback of its class that has none yet."""
    waiting = list(callbacks)
    for name, state in saved:
        match = next((callback for callback in waiting if class_path(callback) == name), None)
        if match is not None:
            waiting.remove(match)
            match.load_state_dict(state)


def check_model_state(current: Mapping[str, Any], saved: Mapping[str, Any], source: Path) -> None:
    """Compare names, shapes and dtypes. Raises CheckpointError that names the first that differ."""

    def sketch(state: Mapping[str, Any]) -> dict[str, str]:
        return {n: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else "extra" for n, v in state.items()}

    here, there = sketch(current), sketch(saved)
    differing = [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"{source} is of another model: {'; '.join(differing[:3])}{more}.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load pretrained weights, a safetensors file under the model's own names. Raises CheckpointError."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            left_out = dict(json.loads((file.metadata() or {}).get(LEFT_OUT, "{}")))
    except Exception as error:
        raise CheckpointError(f"weights={str(path)!r} cannot be read: {error}. Give a .safetensors file.") from error
    if broken := [name for name, value in weights.items() if value.is_floating_point() and value.float().isnan().any()]:
        raise CheckpointError(f"weights={str(path)!r}: expected numbers, found NaN in {broken[0]}. Use another file.")
    load_model(model, with_base(model, weights, left_out, path), path)


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Give a model on `device` the state that a checkpoint has of it. Raises CheckpointError."""
    checkpoint.complete(model)
    take_shapes(model, checkpoint.model, device)
    load_model(model, checkpoint.model, checkpoint.path)
    UnsavedBuffers(model).load(checkpoint["buffers"], device)


def load_model(model: nn.Module, saved: Mapping[str, Any], source: Path) -> None:
    """Load a model's state under the user's own names. Raises CheckpointError if it is another model's."""
    own = model.state_dict()
    names = {user_name(name): name for name in own}  # those of torch.compile
    current = {name: own[full] for name, full in names.items() if isinstance(own[full], Tensor) or name in saved}
    check_model_state(current, saved, source)
    model.load_state_dict({names[name]: value for name, value in saved.items()}, strict=False)


def _compare(parts: RunParts, checkpoint: Checkpoint, allows_changes: bool) -> None:
    here = {"identity": parts.identity, "schedule": parts.schedule.state_dict()}
    differing = differences(here, {name: checkpoint[name] for name in here})
    if not differing:
        return
    if not allows_changes:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of another run: {'; '.join(differing)}. Use a new run_dir, or "
            "resume_with_changes=True."
        )
    log.warning("resuming with changes: %s.", "; ".join(differing))
