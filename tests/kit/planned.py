"""Plans window by window: the sums of a plan, which the engine has in closed form, are compared with these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.data.map_style import samples_before
from engine.plan.schedule import Stage
from engine.plan.windows import Plan, PlannedWindow
from engine.preview.preview import Preview


class PlannedUpdate(NamedTuple):
    """One update to come, under the names of its record in metrics.jsonl."""

    update: int
    epoch: int
    samples: int  # over all processes since the start, this update included
    effective_batch: int
    lr: float
    stage: Stage
    micro_batches: int  # of all processes together
    turns: int  # micro-batches of the process that has most of them


def all_windows(plan: Plan) -> Iterator[tuple[int, PlannedWindow]]:
    """Yield (epoch, window) for each update of a run."""
    epoch = update = 0
    while plan.max_epochs is None or epoch < plan.max_epochs:
        before = update
        for window in plan.windows(epoch, update):
            yield epoch, window
            update += 1
        if update == before:
            return
        epoch += 1


def planned_updates(preview: Preview) -> Iterator[PlannedUpdate]:
    """Yield every update of the run."""
    plan, settings, P = preview.plan, preview.settings, preview.strategy.data_parallel_size
    assert plan is not None
    samples = 0
    for number, (epoch, window) in enumerate(all_windows(plan)):
        before = samples_before(preview.task.order(epoch) or ()) if preview.is_grouped else range(plan.samples + 1)
        effective_batch = before[window.stop] - before[window.start]
        pieces = window.count(settings.micro_batch_size, P, settings.spread_windows)
        samples += effective_batch
        lr = preview.lrs(number) * window.stage.lr_factor
        yield PlannedUpdate(number + 1, epoch, samples, effective_batch, lr, window.stage, pieces, -(-pieces // P))
