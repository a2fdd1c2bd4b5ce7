"""Previews of `Trainer.fit`, without process group, device, training or files."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from engine.checkpoint import files
from engine.data.map_style import samples_before
from engine.errors import UserError
from engine.preview.forecast import LearningRates, StageForecast, stage_forecasts
from engine.settings import AUTO, class_path
from engine.task import Task
from engine.trainer import Trainer
from engine.training.build import lay_out, make_model
from engine.update.model_checks import check_optimizer, count_batch_norms
from strategies.environment import started_processes

JUMP = 1.5  # an effective batch that changes by this factor needs another learning rate

MOST_STEPS = 1_000_000
"""The most steps that an LR scheduler makes for a plan. The rates of more updates are unknown without a formula."""


def learning_rates(optimizer: Optimizer, lr_scheduler: LRScheduler | None, updates: int) -> LearningRates:
    """Return the learning rate of each of `updates` updates (of the first parameter group), by its number.

    A formula is asked where it is read. Another scheduler moves now; the optimizer makes no step.
    """
    group = optimizer.param_groups[0]
    if lr_scheduler is None:
        constant = float(group["lr"])
        return lambda _: constant
    if type(lr_scheduler) is LambdaLR:
        base, factor = lr_scheduler.base_lrs[0], lr_scheduler.lr_lambdas[0]
        return lambda update: float(base * factor(update))
    if updates > MOST_STEPS:
        return lambda _: None
    rates = array("d")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer made no step
        for _ in range(updates):
            rates.append(float(group["lr"]))
            lr_scheduler.step()
    return rates.__getitem__


class Preview:
    """The plan of `trainer.fit(task)` from its start, on the strategy's number of processes.

    It reads the data's length and builds model, optimizer and LR scheduler as `fit` does; `trainer` does not change.
    Raises UserError if the task cannot be trained, and for a stream, of which little is known before it has ended.
    """

    def __init__(self, trainer: Trainer, task: Task) -> None:
        self.settings, self.strategy, self.task = trainer.settings, trainer.strategy, task
        if self.settings.micro_batch_size == AUTO:
            raise UserError("micro_batch_size='auto': a plan needs a number, which a run finds. Give one, or --check.")
        task.prepare_data()
        layout = lay_out(task, self.settings, trainer.scheduling, self.strategy, self.settings.N)
        if layout.plan is None:
            raise UserError("train_data() is a stream: a plan expected data with a length. Use --check.")
        self.schedule, self.plan = layout.schedule, layout.plan
        self.model = make_model(task, self.settings.seed)
        optimizing = check_optimizer(task.configure_optimizer(self.model), self.model)
        self.lrs = learning_rates(*optimizing, self.plan.updates)  # the learning rate of an update, by its number

    @property
    def is_grouped(self) -> bool:
        """Whether the task's order holds groups of samples, so that a window takes whole groups."""
        order = self.task.order(0)
        return order is not None and isinstance(order[0], Sequence)

    @cached_property
    def stages(self) -> list[StageForecast]:
        """Return the stages that the run reaches."""
        settings, P = self.settings, self.strategy.data_parallel_size
        before = (lambda epoch: samples_before(self.task.order(epoch) or ())) if self.is_grouped else None
        return list(stage_forecasts(self.plan, settings.N, P, settings.spread_windows, self.lrs, before))

    def warnings(self) -> list[str]:
        """Return warnings about the schedule, the model and the end of the run, a sentence each."""
        return [*self._of_the_schedule(), *self._of_the_model(), *self._of_the_end()]

    def _of_the_schedule(self) -> Iterator[str]:
        schedule, samples, reached = self.schedule, self.plan.samples, self.stages
        for stage in schedule.stages[schedule.stages.index(reached[-1].stage) + 1 :]:
            K = stage.accumulate_grad_batches
            yield f"the run ends before {schedule.unit} {stage.first}, where K would become {K}."
        for B in (forecast.stage.effective_batch for forecast in reached):
            if samples < B:
                epoch = f"an epoch of {samples:,}"
                yield f"a window of {B:,} samples is larger than {epoch}: each epoch makes one update, of all samples."
        for before, after in pairwise(reached):
            old, new = before.stage.effective_batch, after.stage.effective_batch
            left, right = before.lr[1], after.lr[0]
            if max(old, new) < JUMP * min(old, new) or left is None or right is None:
                continue
            if abs(right - left) < 0.1 * abs(left):
                yield (
                    f"the effective batch goes from {old:,} to {new:,} at {schedule.unit} {after.stage.first}, and the "
                    f"learning rate does not follow ({left:.3g}, then {right:.3g}). "
                    "lr_rule='linear' or 'sqrt' makes it follow."
                )

    def _of_the_model(self) -> Iterator[str]:
        strategy, N, norms = self.strategy, self.settings.N, count_batch_norms(self.model)
        if strategy.data_parallel_size == 1 < started_processes():
            yield f"strategy {strategy.name!r} shares samples with none of the {started_processes()} processes."
        if norms and any(stage.accumulate_grad_batches > 1 for stage in self.schedule.stages):
            yield f"{norms} BatchNorm layers normalise over a micro-batch of {N}, not over the window: use GroupNorm."

    def _of_the_end(self) -> Iterator[str]:
        lrs, count = self.lrs, self.plan.updates
        before, last = (lrs(count - 2), lrs(count - 1)) if count > 1 else (None, None)
        some = [lrs(update) for update in range(0, count, max(1, count // 1000))]
        if before is not None and last is not None and last > before and last >= max(lr or 0.0 for lr in some):
            end = f"the last of {count:,} updates ({last:.3g})"
            yield f"the learning rate still rises at {end}: is its warm-up longer than the run?"
        if self.settings.max_time is not None:
            yield f"max_time={self.settings.max_time} may end the run before."
        run_dir = self.settings.run_dir
        if run_dir is not None and files.candidates(Path(run_dir) / "checkpoints"):
            yield f"{run_dir} has checkpoints: the run resumes there, or is refused; this plan is that of a new run."

    def describe(self) -> str:
        """Return what is planned, in one line."""
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return f"{class_path(self.task)}, {type(self.model).__name__} with {count:,} parameters"
