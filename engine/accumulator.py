"""For people who own their loop: exact windows without the Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.checks import check_count, check_equal_windows, check_optimizer, check_windows
from engine.data.map_style import LoaderOptions
from engine.data.sources import make_plan, make_source
from engine.data.window import Window
from engine.loss import Loss
from engine.plan.schedule import check_scheduling, make_schedule
from engine.task import Batching
from engine.update.message import Outcome
from engine.update.updater import Loop, LoopOptions
from strategies import Strategy


class Accumulator:
    """Cuts data into windows and makes one exact update of each, in a loop that you write.

    `strategy` is set up, `model` is what its `prepare` returned, and `data` is what `Task.train_data` may return. K is
    `accumulate_grad_batches`, a number or a schedule by epoch such as `{0: 8, 4: 4}`; the other arguments are those of
    `Trainer`, and `batching` says how samples become micro-batches. Raises ValueError for an argument that cannot be.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Optimizer,
        data: Any,
        micro_batch_size: int = 32,
        accumulate_grad_batches: int | dict[int, int] = 1,
        lr_scheduler: LRScheduler | None = None,
        gradient_clip_norm: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        batching: Batching | None = None,
    ) -> None:
        check_count("micro_batch_size", micro_batch_size)
        K = accumulate_grad_batches
        scheduling = check_scheduling(K if isinstance(K, dict) else {0: K})
        check_windows(scheduling, strategy)
        if strategy.micro_batches is not None:
            raise ValueError(
                f"strategy {strategy.name!r} runs its windows whole, which a loop of one's own cannot: use Trainer."
            )
        check_optimizer(optimizer if lr_scheduler is None else (optimizer, lr_scheduler), model)
        strategy.prepare_optimizer(optimizer)
        schedule = make_schedule(micro_batch_size, strategy.effective_batch, scheduling)
        batching = batching or Batching()
        plan = make_plan(data, batching, schedule, micro_batch_size, None, None)
        each_epoch_once = plan and replace(plan, max_epochs=max(scheduling) + 1)
        check_equal_windows(strategy, each_epoch_once, micro_batch_size, spread=False)
        self._source = make_source(
            data, batching, strategy, schedule, plan, micro_batch_size, seed, shuffle, LoaderOptions()
        )
        self._loop = Loop(strategy, model, optimizer, lr_scheduler, LoopOptions(gradient_clip_norm, seed=seed))
        self.update = 0
        """Updates made since the start, skipped ones included."""
        self.samples = 0
        """Samples trained on since the start, over all processes."""

    def windows(self, epoch: int) -> Iterator[OwnWindow]:
        """Yield the windows of `epoch`: iterate over each, then call its `update`."""
        for window in self._source.windows(epoch, self.update, self.samples):
            self._loop.start(window, epoch, self.update)
            before = self.update
            yield OwnWindow(self._loop, window, self)
            if self.update == before:
                raise ValueError("a window ended without window.update(): call it after the last backward.")


class OwnWindow:
    """One window: iterate over it for this process's batches, call `backward` for each, and `update` at the end.

    The loop's body is the context in which only the last micro-batch communicates: forward and backward belong in it.
    """

    def __init__(self, loop: Loop, window: Window, accumulator: Accumulator) -> None:
        self._loop, self._window, self._accumulator = loop, window, accumulator

    def __iter__(self) -> Iterator[Any]:
        for micro in self._window:
            with self._loop.strategy.accumulation_context(micro.is_last):
                self._micro = micro
                self._loop.seed(micro)
                yield micro.batch

    def backward(self, loss: Loss | Tensor) -> None:
        """Add the micro-batch's gradient: of a mean over its samples (0-dim tensor), or of a `Loss`."""
        self._loop.strategy.backward(*self._loop.weigh(loss, self._micro))

    def update(self) -> Outcome:
        """Reduce, correct, clip, step and clear the gradients; return what the update was, over all processes."""
        if self._window.is_empty:
            self._loop.strategy.join(self._window)
        outcome = self._loop.finish(self._window, self._accumulator.update)
        self._accumulator.update += 1
        self._accumulator.samples += outcome.samples
        return outcome
