"""What `Trainer.fit` would do, without doing it: no process group, no device, no training, nothing written."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.checkpoint import files
from engine.checkpoint.snapshot import class_path
from engine.checks import batch_norms
from engine.data.map_style import samples_before
from engine.preview.forecast import Expected, Stretch, expected_updates, stretches, stretches_of_stream
from engine.task import Task
from strategies.environment import started_processes

if TYPE_CHECKING:
    from engine.trainer import Trainer

JUMP = 1.5
"""An effective batch that grows or shrinks by so much should make one think of the learning rate."""


def preview(trainer: Trainer, task: Task) -> Preview:
    """Return what `trainer.fit(task)` would do from its start, for as many processes as the strategy counts.

    Reads the data's length and builds model, optimizer and LR scheduler as `fit` does; `trainer` stays as it is. Raises
    ValueError for what cannot be trained.
    """
    trainer = copy(trainer)
    task.prepare_data()
    trainer.lay_out(task)
    trainer.make_model(task)
    trainer.make_optimizer(task)
    updates = 1 if trainer.total_updates is None else trainer.total_updates
    return Preview(trainer, task, learning_rates(trainer.optimizer, trainer.lr_scheduler, updates))


def learning_rates(optimizer: Optimizer, lr_scheduler: LRScheduler | None, updates: int) -> Sequence[float]:
    """Return the learning rate of each update (of the first parameter group); the optimizer makes no step."""
    rates, group = array("d"), optimizer.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps
        for _ in range(updates):
            rates.append(float(group["lr"]))
            if lr_scheduler is not None:
                lr_scheduler.step()
    return rates


@dataclass(frozen=True)
class Preview:
    """A run before it starts. `trainer` is laid out, `lrs` are those of its updates (of a stream: as far as known)."""

    trainer: Trainer
    task: Task
    lrs: Sequence[float]

    @property
    def is_stream(self) -> bool:
        """Whether the data has no length."""
        return self.trainer.plan is None

    @property
    def is_grouped(self) -> bool:
        """Whether the task's order holds groups of samples, of which a window takes so many."""
        order = None if self.is_stream else self.task.order(0)
        return order is not None and isinstance(order[0], Sequence)

    @property
    def bytes_per_update(self) -> int | None:
        """What one update's gradients send, on each process; None where the strategy cannot tell before `setup`."""
        return self.trainer.strategy.bytes_to_reduce(self.trainer.model)

    def updates(self) -> Iterator[Expected]:
        """Yield every update of the run; of a stream none, for nothing is known of them."""
        trainer, plan = self.trainer, self.trainer.plan
        if plan is None:
            return iter(())
        P, spread = trainer.strategy.data_parallel_size, trainer.settings["spread_windows"]
        is_grouped = self.is_grouped

        def before(epoch: int) -> Sequence[int]:
            order = self.task.order(epoch) if is_grouped else None
            return range(plan.samples + 1) if order is None else samples_before(order)

        return expected_updates(plan, trainer.micro_batch_size, P, spread, self.lrs, before)

    @cached_property
    def stretches(self) -> list[Stretch]:
        """Return the stages that the run reaches."""
        if self.is_stream:
            epochs = self.trainer.settings["max_epochs"] if self.trainer.settings["max_updates"] is None else None
            return list(stretches_of_stream(self.trainer.schedule, epochs, self.trainer.total_updates, self.lrs))
        return list(stretches(self.updates()))

    def warnings(self) -> list[str]:
        """Return what one should think about before paying, a sentence each."""
        return [*self._of_the_schedule(), *self._of_the_model(), *self._of_the_end()]

    def _of_the_schedule(self) -> Iterator[str]:
        schedule, plan, reached = self.trainer.schedule, self.trainer.plan, self.stretches
        for stage in schedule.stages[schedule.stages.index(reached[-1].stage) + 1 :]:
            K = stage.accumulate_grad_batches
            yield f"the run ends before {schedule.unit} {stage.first}, where K would become {K}."
        for stretch in reached:
            B = stretch.stage.effective_batch
            if plan is not None and plan.samples < B:
                yield (
                    f"a window of {B:,} samples is larger than an epoch of {plan.samples:,}: each epoch makes one "
                    "update, of all that there is."
                )
        for before, after in pairwise(reached):
            old, new = before.stage.effective_batch, after.stage.effective_batch
            left, right = before.lr[1], after.lr[0]
            if max(old, new) < JUMP * min(old, new) or left is None or right is None:
                continue
            if abs(right - left) < 0.1 * abs(left):
                yield (
                    f"the effective batch goes from {old:,} to {new:,} at {schedule.unit} {after.stage.first}, and the "
                    f"learning rate does not follow ({left:.3g}, then {right:.3g}): is that meant?"
                )

    def _of_the_model(self) -> Iterator[str]:
        strategy, N, norms = self.trainer.strategy, self.trainer.micro_batch_size, batch_norms(self.trainer.model)
        if strategy.data_parallel_size == 1 < started_processes():
            yield f"strategy {strategy.name!r} shares samples with none of the {started_processes()} processes."
        if norms and any(stage.accumulate_grad_batches > 1 for stage in self.trainer.schedule.stages):
            yield (
                f"{norms} BatchNorm layers take their statistics from one micro-batch of {N}, not from the window: "
                "GroupNorm or LayerNorm would not know the difference."
            )

    def _of_the_end(self) -> Iterator[str]:
        trainer, lrs = self.trainer, self.lrs
        if len(lrs) > 1 and lrs[-1] > lrs[-2] and lrs[-1] == max(lrs):
            yield (
                f"the learning rate still rises at the last of {len(lrs):,} updates ({lrs[-1]:.3g}): is its warm-up "
                "longer than the run?"
            )
        if trainer.settings["max_time"] is not None:
            yield f"max_time={trainer.settings['max_time']} may end the run before."
        run_dir = trainer.settings["run_dir"]
        if run_dir is not None and files.candidates(Path(run_dir) / "checkpoints"):
            yield (
                f"{run_dir} has checkpoints: the run would go on from there, with the effective batches that it began "
                "with; this plan begins anew."
            )

    def describe(self) -> str:
        """Return what is planned, in one line."""
        model = self.trainer.model
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{class_path(self.task)}, {type(model).__name__} with {count:,} parameters"
