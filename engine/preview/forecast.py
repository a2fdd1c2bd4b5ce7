"""Forecasts of a run from its plan, stage by stage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import attrgetter

from engine.plan.schedule import Stage
from engine.plan.windows import Plan, PlannedWindow

LearningRates = Callable[[int], float | None]
"""From the number of an update to its learning rate; None if that is unknown."""


@dataclass(frozen=True)
class StageForecast:
    """One stage of the schedule, as far as the run reaches it."""

    stage: Stage
    epochs: tuple[int, int]  # the first and the last, from 0
    updates: int
    samples: int
    micro_batches: int
    turns: int  # reductions that there would be with one at each micro-batch
    last_window: int  # samples of the stage's last update
    lr: tuple[float | None, float | None]  # the learning rate of its first and its last update


def stage_forecasts(
    plan: Plan,
    N: int,
    P: int,
    spread: bool,
    lrs: LearningRates,
    samples_before: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[StageForecast]:
    """Yield what each stage comes to, in closed form.

    If positions are groups, `samples_before(epoch)` counts the samples before each of them.
    """
    pieces = cache(lambda size: PlannedWindow(0, size, plan.schedule.stages[0]).count(N, P, spread))
    for stage, group in groupby(plan.stretches(), key=attrgetter("stage")):
        stretches = [*group]
        first, last = stretches[0], stretches[-1]
        samples = micro_batches = turns = size = 0
        for s in stretches:
            for count, size in s.sizes():
                micro_batches += count * pieces(size)
                turns += count * -(-pieces(size) // P)
            offsets = [samples_before(epoch) for epoch in range(s.epoch, s.epoch + s.epochs)] if samples_before else []
            samples += sum(at[s.stop] - at[s.start] for at in offsets) or (s.stop - s.start) * s.epochs
        if offsets:
            size = offsets[-1][last.stop] - offsets[-1][last.stop - size]
        epochs, end = (first.epoch, last.epoch + last.epochs - 1), last.update + last.updates
        rates = lrs(first.update), lrs(end - 1)
        first_lr, last_lr = (None if lr is None else lr * stage.lr_factor for lr in rates)
        yield StageForecast(stage, epochs, end - first.update, samples, micro_batches, turns, size, (first_lr, last_lr))
