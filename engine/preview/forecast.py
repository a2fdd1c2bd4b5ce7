"""Forecasts of a run from its plan: update by update, and stage by stage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

from engine.plan.schedule import Schedule, Stage
from engine.plan.windows import Plan, PlannedWindow

LearningRates = Sequence[float | None]
"""The learning rate of each update; None if it is unknown."""


class PlannedUpdate(NamedTuple):
    """One update to come, under the names of its record in metrics.jsonl."""

    update: int
    epoch: int
    samples: int  # over all processes since the start, this update included
    effective_batch: int
    lr: float | None  # None: unknown, of too many updates
    stage: Stage
    micro_batches: int  # of all processes together
    turns: int  # micro-batches of the process that has most of them


@dataclass(frozen=True)
class StageForecast:
    """One stage of the schedule, as far as the run reaches it. None: unknown, for a stream."""

    stage: Stage
    epochs: tuple[int, int] | None = None  # the first and the last, from 0
    updates: int | None = None
    samples: int | None = None
    micro_batches: int | None = None
    turns: int | None = None  # reductions that there would be with one at each micro-batch
    last_window: int | None = None  # samples of the stage's last update
    lr: tuple[float | None, float | None] = (None, None)  # the learning rate of its first and its last update


def planned_updates(
    plan: Plan, N: int, P: int, spread: bool, lrs: LearningRates, samples_before: Callable[[int], Sequence[int]]
) -> Iterator[PlannedUpdate]:
    """Yield every update of a run; `samples_before(epoch)` counts the samples before each position of its order."""
    samples, current, before = 0, -1, samples_before(0)
    for number, (epoch, window) in enumerate(plan.all_windows()):
        if epoch != current:
            current, before = epoch, samples_before(epoch)
        effective_batch, pieces = before[window.stop] - before[window.start], window.count(N, P, spread)
        samples += effective_batch
        lr, stage = _scaled(lrs[number], window.stage.lr_factor), window.stage
        yield PlannedUpdate(number + 1, epoch, samples, effective_batch, lr, stage, pieces, -(-pieces // P))


def forecasts(plan: Plan, N: int, P: int, spread: bool, lrs: LearningRates) -> Iterator[StageForecast]:
    """Yield what each stage comes to, in closed form."""
    pieces = cache(lambda samples: PlannedWindow(0, samples, plan.schedule.stages[0]).count(N, P, spread))
    for stage, group in groupby(plan.stretches(), key=itemgetter(-1)):
        stretches = [*group]
        first, last = stretches[0], stretches[-1]
        samples = micro_batches = turns = size = 0
        for count, size in chain.from_iterable(stretch.sizes() for stretch in stretches):
            samples += count * size
            micro_batches += count * pieces(size)
            turns += count * -(-pieces(size) // P)
        epochs, end = (first.epoch, last.epoch + last.epochs - 1), last.update + last.updates
        lr = _scaled(lrs[first.update], stage.lr_factor), _scaled(lrs[end - 1], stage.lr_factor)
        yield StageForecast(stage, epochs, end - first.update, samples, micro_batches, turns, size, lr)


def _scaled(lr: float | None, factor: float) -> float | None:
    return None if lr is None else lr * factor


def stage_forecasts(updates: Iterator[PlannedUpdate]) -> Iterator[StageForecast]:
    """Sum up the updates of each stage."""
    for stage, group in groupby(updates, key=lambda update: update.stage):
        yield _sum(stage, group)


def _sum(stage: Stage, updates: Iterator[PlannedUpdate]) -> StageForecast:
    first = last = next(updates)
    micro_batches, turns = first.micro_batches, first.turns
    for last in updates:
        micro_batches += last.micro_batches
        turns += last.turns
    count, samples = last.update - first.update + 1, last.samples - first.samples + first.effective_batch
    epochs, lrs = (first.epoch, last.epoch), (first.lr, last.lr)
    return StageForecast(stage, epochs, count, samples, micro_batches, turns, last.effective_batch, lrs)


def stream_stages(
    schedule: Schedule, epochs: int | None, total: int | None, lrs: LearningRates
) -> Iterator[StageForecast]:
    """Yield what is known of each stage of a stream, which ends after `epochs` or `total` updates, if known."""
    for stage, following in zip(schedule.stages, [*schedule.stages[1:], None], strict=True):
        counts = schedule.unit == "update"
        start = stage.first if counts or stage.first == 0 else None
        stop = total if following is None else following.first if counts else None
        if start is not None and total is not None:
            if start >= total:
                return
            stop = None if stop is None else min(stop, total)
        updates, span = None if start is None or stop is None else stop - start, None
        if schedule.unit == "epoch" and epochs is not None:
            if stage.first >= epochs:
                return
            span = stage.first, min(epochs, epochs if following is None else following.first) - 1
        at = (start, None if stop is None else stop - 1)
        lr = tuple(_scaled(lrs[u], stage.lr_factor) if u is not None and u < len(lrs) else None for u in at)
        yield StageForecast(stage, span, updates, lr=(lr[0], lr[1]))
