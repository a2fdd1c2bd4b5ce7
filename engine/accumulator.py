"""Exact windows for people who own their loop, without the Trainer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.data.checks import check_equal_windows, check_windows
from engine.data.map_style import LoaderOptions
from engine.data.sources import make_plan, make_source
from engine.data.window import Window
from engine.errors import ProcessFailureError, UserError, check_count, describe
from engine.loss import Loss
from engine.plan.schedule import check_scheduling, make_schedule
from engine.state import RunState
from engine.task import Batching
from engine.update.exchange import FAILURE_TOPIC, lost_contact
from engine.update.message import Outcome
from engine.update.model_checks import check_no_gradients, check_optimizer
from engine.update.updater import UpdateOptions, Updater
from strategies import MicroBatch, Strategy


class Accumulator:
    """Cuts data into windows and makes one exact update of each, in a loop that you write.

    `strategy` is set up, `model` is what its `prepare` returned, and `data` is what `Task.train_data` may return. K is
    `accumulate_grad_batches`, a number or a schedule by epoch such as `{0: 8, 4: 4}`; the other arguments are those of
    `Trainer`, and `batching` says how samples become micro-batches. Raises UserError for an invalid argument.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Any],
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
            raise UserError(
                f"strategy {strategy.name!r} runs whole windows, which a loop of your own cannot. Use Trainer."
            )
        optimizer, lr_scheduler = check_optimizer(
            optimizer if lr_scheduler is None else (optimizer, lr_scheduler), model
        )
        strategy.prepare_optimizer(optimizer)
        schedule = make_schedule(micro_batch_size, strategy.effective_batch, scheduling)
        batching = batching or Batching()
        plan = make_plan(data, batching, schedule, micro_batch_size, None, None)
        each_epoch_once = plan and replace(plan, max_epochs=max(scheduling) + 1)
        check_equal_windows(strategy, each_epoch_once, micro_batch_size, spread=False)
        self._source = make_source(
            data, batching, strategy, schedule, plan, micro_batch_size, seed, shuffle, LoaderOptions()
        )
        self._updater = Updater(strategy, model, optimizer, lr_scheduler, UpdateOptions(gradient_clip_norm, seed=seed))
        self._state = RunState()

    @property
    def update(self) -> int:
        """Updates since the start, skipped ones included."""
        return self._state.update

    @property
    def samples(self) -> int:
        """Samples trained on since the start, over all processes."""
        return self._state.samples

    def windows(self, epoch: int) -> Iterator[OwnWindow]:
        """Yield the windows of `epoch`: iterate over each, then call its `update`."""
        state = self._state
        state.epoch = epoch
        for window in self._source.windows(epoch, state.update, state.samples):
            self._updater.begin(window, state)
            own = OwnWindow(self._updater, window, state)
            yield own
            own.end()


class OwnWindow:
    """One window: iterate over it for this process's batches, call `backward` for each, and `update` at the end.

    The loop's body is the context in which only the last micro-batch communicates: forward and backward belong in it.
    """

    def __init__(self, updater: Updater, window: Window, state: RunState) -> None:
        self._updater, self._window, self._state = updater, window, state
        self._micro: MicroBatch | None = None
        """The micro-batch that waits for its backward."""
        self._batches = self._read()
        self._was_read = self._was_updated = False
        self._is_complete = window.is_empty
        """Whether the last backward was called."""

    def __iter__(self) -> Iterator[Any]:
        if self._was_read:
            self._stop(UserError("a window was iterated over twice. Iterate over each once."))
        self._was_read = True
        return self._batches

    def _read(self) -> Generator[Any]:
        try:
            check_no_gradients(self._updater.model)
            for micro in self._window:
                with self._updater.strategy.accumulation_context(micro.is_last):
                    self._micro = micro
                    self._updater.before_forward(micro)
                    yield micro.batch
                if self._micro is not None:
                    raise UserError(
                        "backward was not called for a micro-batch. Call it for each; Loss(0 * loss, 0) leaves one out."
                    )
        except Exception as error:
            self._stop(error)

    def backward(self, loss: Loss | Tensor) -> None:
        """Add the micro-batch's gradient: of a mean over its samples (0-dim tensor), or of a `Loss`."""
        try:
            if self._micro is None:
                raise UserError(
                    "backward was called twice for a micro-batch, or for none. Add up the losses of one micro-batch."
                )
            micro, self._micro = self._micro, None
            self._updater.strategy.backward(*self._updater.after_forward(loss, micro))
            self._is_complete = micro.is_last
        except Exception as error:
            self._batches.close()  # so that the context, in which nothing is reduced, ends
            self._stop(error)

    def log(self, name: str, value: float | Tensor, weight: float | Tensor | None = None) -> None:
        """Record a mean as `Task.log` does, in the outcome's `metrics`. Call it before `backward`."""
        if self._micro is None:
            self._batches.close()
            self._stop(UserError(f"log({name!r}, ...) was called after backward. Call it before."))
        self._updater.logged.append((name, value, weight))

    def update(self) -> Outcome:
        """Reduce, correct, clip, step and clear the gradients; return the update's outcome over all processes."""
        try:
            self._batches.close()  # the loop may have ended early
            if self._was_updated:
                raise UserError("window.update() was called twice. Call it once, after the last backward.")
            if not self._is_complete:
                raise UserError("backward was not called for the window's last micro-batch. Call it for each.")
            if self._window.is_empty:
                self._updater.strategy.join(self._window)
            outcome = self._updater.finish(self._window, self._state)
        except Exception as error:
            self._stop(error)
        self._was_updated = True
        self._state.count(outcome.samples, outcome.weight, outcome.skipped, outcome.overflowed)
        return outcome

    def end(self) -> None:
        """Raise UserError for a window without an update."""
        if not self._was_updated:
            self._stop(UserError("a window ended without window.update(). Call it after the last backward."))

    def _stop(self, error: Exception) -> NoReturn:
        """Let the other processes know of `error` and raise it, or ProcessFailureError if another one is gone."""
        strategy = self._updater.strategy
        if strategy.has_lost_contact(error):
            raise lost_contact(strategy, f"in update {self._state.update}", error) from error
        if not isinstance(error, ProcessFailureError):
            strategy.post(FAILURE_TOPIC, describe(error))
            self._updater.exchange.stop(error)
        raise error
