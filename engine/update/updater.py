"""One update: the forward and backward of a window's micro-batches, one message between processes, one step."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.data.window import Window
from engine.loss import Loss, Terms
from engine.optimizers import group_names
from engine.seeds import ODD, SEED_BITS, forward_seed
from engine.signals import Interrupted, Signals
from engine.state import RunState
from engine.task import Logged
from engine.update.exchange import Exchange
from engine.update.host_rng import HostRng
from engine.update.loss_sum import LossSum
from engine.update.message import NO_REQUESTS, Outcome, Requests
from engine.update.model_checks import check_gradients, check_parameters
from engine.update.noise_scale import NORMS, WEIGHTS, NoiseMeter
from engine.update.rollback import Rollback
from engine.update.scale import Scale
from engine.update.terms import JoinedTerms
from engine.update.timing import NO_TIMER, NoTimer
from strategies import Buffers, MicroBatch, Strategy, with_modes

LossOf = Callable[[nn.Module, Any], Loss | Tensor | Terms]
"""From the prepared model and a batch to the loss, as `Task.loss`."""


@dataclass(frozen=True)
class UpdateOptions:
    """Options of every update: see `Settings`."""

    gradient_clip_norm: float | None = None
    skip_nonfinite_updates: bool = True
    precision: str | None = None
    seed: int = 0
    is_recorded: bool = True  # whether anybody wants the loss, the gradient norm and what is logged
    updates: int | None = None
    """The updates of the run: the first and the last are recorded in any case; None if their number is unknown."""
    noise_scale_every_n_updates: int | None = None


class Updater:
    """Makes one update of each window: for the trainer by `run`, for people's own loops by the steps of `run`."""

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        options: UpdateOptions,
        signals: Signals | None = None,
        timer: NoTimer = NO_TIMER,
    ) -> None:
        self.strategy, self.model = strategy, model
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.options = options
        self.lr = 0.0  # the learning rate of the last update (of the first parameter group)
        self.lr_of_groups: dict[str, float] = {}
        """The learning rate of each group, under `lr/NAME`, if there are several."""
        self._group_names: list[str] = []
        self.losses = LossSum(1.0, options.is_recorded)  # the losses of the current window
        self.scale = Scale(options.precision)
        self.signals = signals or Signals()
        self.exchange = Exchange(strategy, self.signals)
        self.noise: NoiseMeter | None = None
        if (every := options.noise_scale_every_n_updates) is not None:
            self.noise = NoiseMeter(every, speaks=strategy.rank == 0)
            self.exchange.agree_on((NORMS, WEIGHTS))
        self.terms: JoinedTerms | None = None  # if `loss_of` returns several
        self.host_rng = None if signals is None else HostRng(options.seed, strategy.data_parallel_rank)
        buffers = Buffers(model)
        self.rollback = Rollback(buffers, self.host_rng) if self.host_rng or buffers.exist else None
        self.timer = timer
        self._last_update = (options.updates or 0) - 1
        self.logged: list[Logged] = []  # the values that the forward of the current micro-batch has logged
        self.on_gradients: Callable[[], None] | None = None
        """Called when the gradients are reduced, corrected and clipped, before the step."""
        self._skips_nonfinite = options.skip_nonfinite_updates or options.precision == "fp16"
        wants_norm = options.gradient_clip_norm or options.is_recorded or self.noise is not None
        self._needs_norm = bool(self._skips_nonfinite or wants_norm)
        self._may_be_late = False  # whether a process may learn by the norm alone that another ran out of memory
        self._epoch, self._epoch_seed = -1, 0
        self._last_group: dict[str, Any] | None = None
        self._group_count = 0
        self._parameters = [*model.parameters()]

    def allow_redo(self) -> None:
        """End a window that does not fit into memory as `out_of_memory`, on all processes, instead of by an error."""
        self.exchange.can_redo, self._may_be_late = True, not self.exchange.is_alone
        self._needs_norm |= self._may_be_late

    def run(self, loss_of: LossOf, window: Window, state: RunState, requests: Requests = NO_REQUESTS) -> Outcome:
        """Run one window and make its update. If a process is interrupted, all drop it, and the outcome is `aborted`.

        Raises UserError for an invalid loss or weight, what `loss_of` or the data raised, and ProcessFailureError.
        """
        self._loss_of = loss_of
        self.begin(window, state, requests)
        try:
            micros = self.timer.watch(window, state.update)
            if self.terms is not None:
                micros = self.terms.counted(micros, state.update)
            self.strategy.run_window(micros, self._forward)
        except Exception as error:
            self.exchange.stop(error)  # the other processes learn of it; raises it unless it is a signal's
        return self.finish(window, state)

    def begin(self, window: Window, state: RunState, requests: Requests = NO_REQUESTS) -> None:
        """Begin a window: nothing is summed yet."""
        is_recorded = self.options.is_recorded or state.update in (0, self._last_update)  # errors come early
        self.losses = LossSum(self.scale.begin(window), is_recorded)
        if self.rollback is not None:
            self.rollback.begin(state.update)
        if self.noise is not None:
            self.noise.is_due = state.update % self.noise.every == 0
        groups = self.optimizer.param_groups
        if state.epoch != self._epoch or groups[-1] is not self._last_group or len(groups) != self._group_count:
            self._start_epoch(state.epoch)
        self.strategy.start_window(window.most_micro_batches)
        self.exchange.begin(window, self.losses, requests)

    def _start_epoch(self, epoch: int) -> None:
        """Seed an epoch. Raises UserError if the model or the optimizer has other parameters than at the start."""
        self._epoch, self._epoch_seed = epoch, forward_seed(self.options.seed, epoch)
        self._last_group, self._group_count = self.optimizer.param_groups[-1], len(self.optimizer.param_groups)
        check_parameters(self.model, self.optimizer, self._parameters)
        names = group_names(self.optimizer)
        self._group_names = names if len(names) > 1 else []
        for part in with_modes(self.optimizer):
            part.train()

    def _forward(self, micro: MicroBatch) -> tuple[Tensor, float]:
        self.before_forward(micro)
        return self.after_forward(self._loss_of(self.model, micro.batch), micro)

    def before_forward(self, micro: MicroBatch) -> None:
        """Seed the forward of a micro-batch. Raises Interrupted after a signal."""
        if self.signals.stop_requested:
            raise Interrupted
        if self.logged:  # by a forward that has ended early
            self.logged.clear()
        if micro.is_last:
            self.timer.last_micro_batch()
            if self.noise is not None and self.noise.is_due:
                self._note_own_gradient()
        self.strategy.seed(self._epoch_seed + micro.seed_index * ODD & SEED_BITS)

    def _note_own_gradient(self) -> None:
        """Put this process's part of Q, V and V2 into the message: see `noise_scale.moments`. No host-device sync."""
        has_one_weight = self.losses.micro_batches and self.terms is None
        norm = self.strategy.own_norm() if has_one_weight else None
        square, weight = (0.0, 0.0) if norm is None else (norm.double().square(), self.losses.weight)
        self.exchange.means.by_name |= {NORMS: (square, weight), WEIGHTS: (weight * weight, weight)}

    def after_forward(self, loss: Loss | Tensor | Terms, micro: MicroBatch) -> tuple[Tensor, float]:
        """Add a micro-batch's loss to the window's; return the tensor and the scale that backward needs."""
        if self.terms is not None:
            loss = self.terms.joined(loss)
        scaled = self.losses.add(loss, micro)
        if self.logged:
            if self.losses.is_recorded:
                self.exchange.means.log(self.logged, micro)
            self.logged.clear()
        if micro.is_last:
            self.exchange.send()  # the message travels while the last backward runs
        return scaled

    def finish(self, window: Window, state: RunState) -> Outcome:
        """Correct, clip, step: once per window, the same on all processes."""
        agreed = self.exchange.receive(state.update)
        self.timer.reduced()
        if agreed.abort or agreed.out_of_memory:
            return self._undo(out_of_memory=not agreed.abort)
        if state.update == 0 and not self.exchange.is_late:
            check_gradients(self.model.named_parameters())
        samples = int(agreed.samples)
        window.close(agreed.has_more > 0, samples)
        norm, factor = math.nan, self.scale.factor(agreed.weight)
        if self._needs_norm:
            norm = self.strategy.clip(self.options.gradient_clip_norm, factor).item()
        elif factor != 1.0:
            self.strategy.clip(None, factor)
        is_late, may_be_late = self.exchange.is_late, self._may_be_late
        if may_be_late and (is_late or not math.isfinite(norm)) and any(self.strategy.gather(is_late)):
            return self._undo(out_of_memory=True)
        self.exchange.grad_norm = norm
        if self.on_gradients is not None:
            self.on_gradients()
        overflowed = self._skips_nonfinite and not math.isfinite(norm)
        skipped = overflowed or agreed.weight == 0
        lr_factor = window.stage.lr_factor
        if not skipped and lr_factor == 1.0:
            self.optimizer.step()
        elif not skipped:
            with _scaled_lr(self.optimizer, lr_factor):
                self.optimizer.step()
        elif self.rollback is not None:
            self.rollback.skip()
        self.scale.end(agreed.weight, overflowed)
        self.lr = lr_factor * float(self.optimizer.param_groups[0]["lr"])
        if self._group_names:
            rates = [lr_factor * float(group["lr"]) for group in self.optimizer.param_groups]
            self.lr_of_groups = {f"lr/{name}": rate for name, rate in zip(self._group_names, rates, strict=True)}
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.strategy.clear_gradients()
        self.timer.end(window, self.losses.micro_batches)
        mean = agreed.loss / agreed.weight if self.losses.is_recorded and agreed.weight else math.nan
        stop, save, metrics = agreed.stop > 0, agreed.save > 0, self.exchange.metrics
        if self.noise is not None:
            K = window.stage.accumulate_grad_batches
            metrics = self.noise.see(metrics, norm, agreed.weight, K, self.losses.scale)
        return Outcome(agreed.weight, mean, samples, norm, skipped, overflowed, stop, save, metrics=metrics)

    def _undo(self, out_of_memory: bool) -> Outcome:
        """Return to the boundary before the window: drop its gradients, restore what forward has changed."""
        if out_of_memory:
            self.strategy.restart_reduction()
        self.strategy.clear_gradients()
        if self.rollback is not None:
            self.rollback.undo()
        return Outcome(0.0, math.nan, 0, math.nan, False, False, True, False, True, out_of_memory)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next update needs of those before."""
        names = [name for name in self.exchange.names if name not in (NORMS, WEIGHTS)]
        noise = {} if self.noise is None else {"noise_scale": self.noise.state_dict()}
        return {**self.scale.state_dict(), "grad_norm": self.exchange.grad_norm, "logged": names, **noise}

    def load_state_dict(self, state: Mapping[str, Any], has_same_precision: bool = True) -> None:
        """Load what `state_dict` returned."""
        self.scale.load_state_dict(dict(state), has_same_precision)
        self.exchange.grad_norm = float(state["grad_norm"])
        self.exchange.agree_on(([] if self.noise is None else [NORMS, WEIGHTS]) + [*state.get("logged", ())])
        if self.noise is not None:
            self.noise.load_state_dict(state.get("noise_scale", ()))


@contextmanager
def _scaled_lr(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates while it is entered; their schedule sees its own."""
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = factor * group["lr"]
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
