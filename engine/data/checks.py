"""Checks of windows and data, made before anything is paid for."""

from collections.abc import Mapping
from typing import Any

from engine.data.counting import counts_terms
from engine.errors import UserError
from engine.plan.windows import Plan, PlannedWindow
from engine.task import Task
from engine.window_task import WindowTask
from strategies import Strategy


def check_windows(scheduling: Mapping[int, int], strategy: Strategy) -> None:
    """Raise UserError for a K that changes, or another than it was built for, if the strategy cannot run it."""
    if len(set(scheduling.values())) > 1 and not strategy.supports_variable_windows:
        raise UserError(
            f"strategy {strategy.name!r} does not support variable windows, but the schedule {dict(scheduling)} "
            "changes K. Use accumulate_grad_batches=K, or another strategy."
        )
    built = strategy.micro_batches
    if built is not None and (others := {*scheduling.values()} - {built}):
        K = min(others)
        raise UserError(
            f"strategy {strategy.name!r} was built for windows of {built} micro-batches (micro_batches={built}), but "
            f"those of this run have {K}. Use accumulate_grad_batches={built}, or build it with micro_batches={K}."
        )


def can_redo(strategy: Strategy) -> bool:
    """Whether a window that ran out of memory can run again in other micro-batches."""
    can_vary = strategy.supports_variable_windows and strategy.micro_batches is None
    return strategy.supports_redo and can_vary and not strategy.needs_equal_windows


def check_auto(N: object, strategy: Strategy) -> None:
    """Raise UserError for `micro_batch_size="auto"` if the strategy cannot find out what fits."""
    if N == "auto" and not (strategy.supports_redo and strategy.supports_variable_windows):
        raise UserError(
            f"micro_batch_size='auto': strategy {strategy.name!r} cannot run a window again after memory ran out. Use "
            "single, dp or ddp, or give a number."
        )


def check_window_losses(task: Task, strategy: Strategy, prefetches: bool) -> None:
    """Raise UserError if the task has a loss over windows or terms, and the strategy cannot run or count them."""
    runs_twice = strategy.supports_window_losses and strategy.micro_batches is None
    if counts_terms(task) and (prefetches or strategy.micro_batches is not None or isinstance(task, WindowTask)):
        what = f"{type(task).__name__} has weights(): expected a Task whose batches wait on the host and run one by one"
        raise UserError(f"{what}. Use DDPStrategy or FSDPStrategy, without prefetch_to_device and TermTask.")
    if isinstance(task, WindowTask) and not runs_twice:
        raise UserError(
            f"strategy {strategy.name!r} does not support losses over a window: expected one that can run a window "
            "twice. Use DDPStrategy or FSDPStrategy."
        )


def check_stream(data: object, strategy: Strategy) -> None:
    """Raise UserError for ready micro-batches if several processes need the same ones."""
    if strategy.processes > strategy.data_parallel_size:
        raise UserError(
            f"strategy {strategy.name!r}: {strategy.processes // strategy.data_parallel_size} processes share each "
            f"micro-batch, but data of type {type(data).__name__} gives each process its own. Return a map-style "
            "dataset (with __getitem__ and __len__)."
        )


def check_equal_windows(strategy: Strategy, plan: Plan | None, N: int, spread: bool) -> None:
    """Raise UserError for windows with unequal numbers of micro-batches, if a prepared model communicates."""
    if not strategy.needs_equal_windows:
        return
    P, reason = strategy.data_parallel_size, "the model has a SyncBatchNorm, which communicates in every forward"
    if plan is None:
        raise UserError(
            f"{reason}, and ready micro-batches may run out on one process before another. Use a norm that does not "
            "communicate (GroupNorm, LayerNorm, BatchNorm), or map-style data."
        )
    for stretch in plan.stretches():
        for _, samples in stretch.sizes():
            if (pieces := PlannedWindow(0, samples, stretch.stage).count(N, P, spread)) % P:
                raise UserError(
                    f"{reason}, but in epoch {stretch.epoch} an update of {samples} samples is {pieces} "
                    f"micro-batches on {P} processes. Use spread_windows=True (with at least as many samples as "
                    "processes), a number of samples that divides, or a norm that does not communicate."
                )


def check_order(order: Any) -> Any:
    """Return the order of an epoch. Raises UserError for one that has no length, or cannot be cut."""
    is_cut = hasattr(order, "__getitem__") and hasattr(order, "__len__") and not isinstance(order, Mapping)
    if order is not None and not is_cut:
        raise UserError(
            f"order() returned a {type(order).__name__}: expected a sequence of indices. Use list(...), or sorted(...) "
            "for a set, whose order may differ between processes."
        )
    return order


def check_dataset(samples: int, micro_batch_size: int, epoch_samples: int) -> None:
    """Raise UserError for a dataset or an order without samples, or with fewer than one micro-batch."""
    if samples == 0 or epoch_samples == 0:
        raise UserError("train_data() has no samples: expected at least one micro-batch.")
    if micro_batch_size > epoch_samples:
        raise UserError(
            f"micro_batch_size={micro_batch_size}: expected at most the {epoch_samples} samples of an epoch. "
            f"Use {epoch_samples} or less."
        )
