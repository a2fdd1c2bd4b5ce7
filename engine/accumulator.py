"""Exact windows for people who own their loop, without the Trainer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.data.checks import check_equal_windows, check_windows
from engine.data.prefetch import OnHost
from engine.data.sources import make_plan, make_source
from engine.data.window import Loading, Window
from engine.errors import UserError, check_count
from engine.loss import Loss, Terms
from engine.plan.schedule import Schedule, Unit, check_scheduling, differences, make_schedule, solve
from engine.state import RunState
from engine.task import Batching
from engine.update.message import Outcome
from engine.update.model_checks import check_no_gradients, check_optimizer
from engine.update.open_window import CallWindow, OpenWindow
from engine.update.terms import JoinedTerms, Weights, WeightsOf
from engine.update.updater import LossOf, UpdateOptions, Updater
from strategies import MicroBatch, Strategy


class Accumulator:
    """Cuts data into windows and makes one exact update of each, in a loop that you write.

    `strategy` is set up, `model` is what its `prepare` returned, and `data` is what `Task.train_data` may return. K is
    `accumulate_grad_batches`, a number or a schedule such as `{0: 8, 4: 4}`, whose keys count epochs, or what `unit`
    says: "epoch", "update" or "sample". `batching` says how samples become micro-batches. The other arguments are those
    of `Trainer`. The epochs are your loop's; `max_epochs` is for `total_updates`, and windows end with `max_updates`.
    `weights` counts several terms in a batch, as `Task.weights`. Without `data` use `open`, and a loop without windows.
    `noise_scale_every_n_updates` asks for `noise_scale` in the outcomes' `metrics`: see `engine.callbacks.NoiseScale`.
    Raises UserError for an invalid argument.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Any],
        data: Any = None,
        micro_batch_size: int = 32,
        accumulate_grad_batches: int | dict[int, int] = 1,
        lr_scheduler: LRScheduler | None = None,
        gradient_clip_norm: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        batching: Batching | None = None,
        effective_batch_size: int | None = None,
        max_epochs: int | None = None,
        max_updates: int | None = None,
        unit: Unit = "epoch",
        noise_scale_every_n_updates: int | None = None,
        weights: WeightsOf | None = None,
    ) -> None:
        N, K, B = micro_batch_size, accumulate_grad_batches, effective_batch_size
        check_count("micro_batch_size", N)
        optional = {"effective_batch_size": B, "max_epochs": max_epochs, "max_updates": max_updates}
        for name, count in {**optional, "noise_scale_every_n_updates": noise_scale_every_n_updates}.items():
            check_count(name, 1 if count is None else count)
        scheduling = check_scheduling(K if isinstance(K, dict) else {0: K}, unit)
        if B is not None and K != 1:
            raise UserError(f"accumulate_grad_batches={K} and effective_batch_size={B} both set the window length.")
        if strategy.micro_batches is not None:
            raise UserError(f"strategy {strategy.name!r} runs whole windows, which your own loop cannot. Use Trainer.")
        if not strategy.has_model:
            raise UserError("the strategy has no model yet. Call strategy.setup(), then strategy.prepare(model).")
        given = optimizer if lr_scheduler is None else (optimizer, lr_scheduler)
        optimizer, lr_scheduler = check_optimizer(given, model)
        strategy.prepare_optimizer(optimizer)
        self._strategy, self._max_epochs, self._max_updates = strategy, max_epochs, max_updates
        self._data, self._cut = iter(()) if data is None else data, (batching or Batching(), N, seed, shuffle, B)
        self._weights = weights
        self._current: OpenWindow | None = None
        self._lay_out(make_schedule(N, strategy.effective_batch, scheduling, unit, B))
        samples = self._plan.samples if self._plan else None
        stated = {"effective_batch_size": B, "scheduling": scheduling, "scheduling_unit": unit, "micro_batch_size": N}
        stated |= {"seed": seed, "shuffle": shuffle, "the number of training samples": samples}
        self._identity = {name: str(value) for name, value in stated.items()}
        self._positions: Any = None  # those of all processes that were loaded, until an epoch resumes from them
        options = UpdateOptions(gradient_clip_norm, seed=seed, noise_scale_every_n_updates=noise_scale_every_n_updates)
        self._updater = Updater(strategy, model, optimizer, lr_scheduler, options)
        self._updater.exchange.sends_at_start = False  # `start_window` in the loop's body comes first
        self._state = RunState()

    def _lay_out(self, schedule: Schedule) -> None:
        """Cut the data by a schedule. Raises UserError for one that does not fit the strategy or the data."""
        strategy, data, (batching, N, seed, shuffle, B) = self._strategy, self._data, self._cut
        check_windows({stage.first: stage.accumulate_grad_batches for stage in schedule.stages}, strategy)
        self._schedule = schedule
        self._plan = plan = make_plan(data, batching, schedule, N, self._max_epochs, self._max_updates, B)
        epochs = 1 + schedule.stages[-1].first // (plan.samples if plan and schedule.unit == "sample" else 1)
        check_equal_windows(strategy, plan and replace(plan, max_epochs=epochs), N, spread=False)
        held = None if self._weights is None else OnHost(batching)
        self._source = make_source(data, schedule, plan, N, Loading(batching, strategy, seed, held, shuffle))

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The LR scheduler that moves once per update. You can set it, since it may need `total_updates`."""
        return self._updater.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, lr_scheduler: LRScheduler) -> None:
        self._updater.lr_scheduler = check_optimizer((self._updater.optimizer, lr_scheduler), self._updater.model)[1]

    @property
    def total_updates(self) -> int | None:
        """The exact number of updates up to `max_epochs` and `max_updates`; None if it is not known beforehand."""
        if self._max_epochs is None:
            return self._max_updates
        return None if self._plan is None else self._plan.updates

    @property
    def epoch(self) -> int:
        """The epoch of the last window, from 0: a loop that resumes begins with it."""
        return self._state.epoch

    @property
    def update(self) -> int:
        """Updates since the start, skipped ones included."""
        return self._state.update

    @property
    def samples(self) -> int:
        """Samples trained on since the start, over all processes."""
        return self._state.samples

    def windows(self, epoch: int) -> Iterator[OwnWindow]:
        """Yield the windows of `epoch`, those that are left of it after `load_state_dict`.

        Iterate over each, then call its `update`. Raises UserError for another epoch than the one that was loaded.
        """
        state, limit = self._state, self._max_updates
        positions, self._positions = self._positions, None
        if positions is not None and epoch != state.epoch:
            end = self._plan and (state.epoch, self._plan.samples)
            if epoch < state.epoch or not all(at == end or (end is None and at["has_ended"]) for at in positions):
                raise UserError(f"epoch={epoch}: expected the one that was loaded. Begin with epoch {state.epoch}.")
            positions = None
        state.epoch = epoch
        if limit is not None and state.update >= limit:
            return
        terms = self._weights and JoinedTerms(self._updater.exchange, self._strategy, self._weights)
        for window in self._source.windows(epoch, state.update, state.samples, positions):
            self._check_done()
            self._updater.begin(window, state)
            self._updater.terms = terms
            yield (own := OwnWindow(self._updater, window, state))
            own.check_done()
            if state.update == limit:
                return

    def open(self, loss: LossOf | None = None, weights: Weights | None = None) -> OpenWindow:
        """Open a window that calls drive, on all processes, without the accumulator's data.

        With `loss(model, batch)`, calls get batches. `weights` are those of several terms in all calls of this process,
        {} if it makes none; processes then exchange a message at once. Raises UserError if a window is open already, or
        if the strategy's forward communicates, as FSDP's does.
        """
        strategy, state = self._strategy, self._state
        if strategy.needs_equal_windows or not strategy.supports_open_windows:
            raise UserError(
                f"strategy {strategy.name!r} communicates in each forward: expected one in which processes can call "
                "backward differently often. Use DDPStrategy without SyncBatchNorm, or accumulator.windows()."
            )
        self._check_done()
        stage = self._schedule.at(state.epoch, state.update, state.samples)
        self._current = window = OpenWindow(self._updater, state, stage, loss, weights)
        return window

    def _check_done(self) -> None:
        if self._current is not None:
            self._current.check_done()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loop needs beside `strategy.state_dict(optimizer)` and the LR scheduler's state.

        Call it on all processes together, between `update` and the next window. It holds plain values.
        """
        self._check_done()
        state, positions = self._state, self._positions  # those that were loaded, if no window has come since
        if positions is None and state.position is not None:
            positions = self._strategy.gather(state.position)
        return {
            "run": state.state_dict(),
            "positions": positions,
            "updater": self._updater.state_dict(),
            "schedule": self._schedule.state_dict(),
            "identity": self._identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned; on another P each effective batch stays, and K follows.

        Raises UserError if the windows, the data or the seed are others.
        """
        saved, here = state["schedule"], {"identity": self._identity, "schedule": self._schedule.state_dict()}
        if differing := differences(here, state):
            raise UserError(f"the state is of another run: {'; '.join(differing)}. Give the same.")
        self._lay_out(solve(saved["effective_batches"], self._cut[1], self._strategy.effective_batch, saved["unit"]))
        self._updater.load_state_dict(state["updater"])
        self._positions, self._state = state["positions"], RunState.of(state["run"], None)


class OwnWindow(CallWindow):
    """One window: iterate over it for this process's batches, call `backward` for each, and `update` at the end.

    The loop's body is the context in which only the last micro-batch communicates: forward and backward belong in it.
    """

    def __init__(self, updater: Updater, window: Window, state: RunState) -> None:
        super().__init__(updater, window, state)
        self._micro: MicroBatch | None = None  # the micro-batch that waits for its backward
        self._batches, self._was_read = self._read(), False
        self._is_complete = window.is_empty  # whether the last backward was called

    def __iter__(self) -> Iterator[Any]:
        if self._was_read:
            self.fail(UserError("a window was iterated over twice. Iterate over each once."))
        self._was_read = True
        return self._batches

    def _read(self) -> Generator[Any]:
        self._updater.strategy.start_window(self._window.most_micro_batches)  # again: the loop may have frozen layers
        try:
            check_no_gradients(self._updater.model)
            micros: Iterable[MicroBatch] = self._window
            if self._updater.terms is not None:
                micros = self._updater.terms.counted(micros, self._state.update)
            for micro in micros:
                with self._updater.strategy.accumulation_context(micro.is_last):
                    self._micro = micro
                    self._updater.before_forward(micro)
                    yield micro.batch
                if self._micro is not None:
                    raise UserError("backward was not called for a micro-batch. Loss(0 * loss, 0) leaves one out.")
        except Exception as error:
            self.fail(error)

    def backward(self, loss: Loss | Tensor | Terms) -> None:
        """Add the micro-batch's gradient: of a mean over its samples (0-dim tensor), of a `Loss`, or of terms."""
        try:
            if self._micro is None:
                raise UserError("backward was called twice for a micro-batch, or for none. Add up the losses of one.")
            micro, self._micro = self._micro, None
            self._updater.strategy.backward(*self._updater.after_forward(loss, micro))
            self._is_complete = micro.is_last
        except Exception as error:
            self._batches.close()  # so that the context, in which nothing is reduced, ends
            self.fail(error)

    def log(self, name: str, value: float | Tensor, weight: float | Tensor | None = None) -> None:
        """Record a mean as `Task.log` does, in the outcome's `metrics`. Call it before `backward`."""
        if self._micro is None:
            self._batches.close()
            self.fail(UserError(f"log({name!r}, ...) was called after backward. Call it before."))
        super().log(name, value, weight)

    def update(self) -> Outcome:
        """Reduce, correct, clip, step and clear the gradients; return the update's outcome over all processes."""
        if self._window.is_empty:
            next(self._batches, None)  # a loop may skip it, and terms are counted there
        try:
            self._batches.close()  # the loop may have ended early
            if self.is_done:
                raise UserError("window.update() was called twice. Call it once, after the last backward.")
            if not self._is_complete:
                raise UserError("backward was not called for the window's last micro-batch. Call it for each.")
            if self._window.is_empty:
                self._updater.exchange.send()
                self._updater.strategy.join(self._window)
            outcome = self._finish()
        except Exception as error:
            self.fail(error)
        self._state.position = self._window.position
        return outcome
