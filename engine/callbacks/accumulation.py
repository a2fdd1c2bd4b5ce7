"""Accumulation schedules: K, the micro-batches per window, as a function of the position in the run."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from engine.callbacks.base import Callback, as_callbacks
from engine.errors import UserError
from engine.plan.schedule import Unit, check_scheduling


class GradientAccumulationScheduler(Callback):
    """Changes K during the run: `{0: 8, 4: 4, 8: 1}` is K=8 in epochs 0 to 3, 4 in 4 to 7, 1 from epoch 8 on.

    `unit` says what the keys count from 0: "epoch", "update", or "sample" (over all processes, since the start; K then
    changes with the first window that starts there or later). K is 1 until the first key, and a pure function of the
    position in the run. Raises UserError except for whole numbers, keys of at least 0 and K of at least 1.
    """

    def __init__(self, scheduling: dict[int, int], unit: Unit = "epoch") -> None:
        self.scheduling = check_scheduling(scheduling, unit)
        self.unit: Unit = unit


class Scheduling(NamedTuple):
    """The places where K changes, and what they count."""

    by_start: dict[int, int]  # {first epoch, update or sample: K}
    unit: Unit = "epoch"


def find_scheduler(callbacks: Iterable[Callback], K: int, effective_batch_size: int | None) -> Scheduling:
    """Return the schedule that `callbacks` or K give. Raises UserError if two of these set the window length."""
    schedulers = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    given = [f"accumulate_grad_batches={K}"] if K != 1 else []
    given += [f"effective_batch_size={effective_batch_size}"] if effective_batch_size is not None else []
    given += [f"GradientAccumulationScheduler({s.scheduling})" for s in schedulers]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both set the window length. Give only one.")
    return Scheduling(schedulers[0].scheduling, schedulers[0].unit) if schedulers else Scheduling({0: K})


def brought_callbacks(task: Any, trainer: Any) -> list[Callback]:
    """Return the callbacks of `task`. Raises UserError if one of them sets the window length: it is known before."""
    callbacks = as_callbacks(list(task.configure_callbacks(trainer)))
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise UserError("configure_callbacks() returned a GradientAccumulationScheduler. Give it to the Trainer.")
    return callbacks
