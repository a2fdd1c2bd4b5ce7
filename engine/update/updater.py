"""One update: the window's micro-batches, one message between the processes, and the boundary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.checks import check_gradients
from engine.data.window import Window
from engine.loss import Loss
from engine.seeds import ODD, SEED_BITS, epoch_key
from engine.signals import Interrupted, Interrupts
from engine.update.host_rng import HostRandomness
from engine.update.loss_sum import Sums
from engine.update.message import (
    CAUSES,
    NOTHING,
    Facts,
    Outcome,
    ProcessFailureError,
    ReplicaError,
    Wishes,
    check_norms,
    total,
)
from engine.update.precision import LossScale
from engine.update.timing import Meter
from strategies import MicroBatch, PendingRows, Strategy

Compute = Callable[[nn.Module, Any], Loss | Tensor]
"""From the prepared model and a batch to the loss, as `Task.loss` does."""


@dataclass(frozen=True)
class LoopOptions:
    """How updates are made: see `Trainer`."""

    gradient_clip_norm: float | None = None
    skip_nonfinite_updates: bool = True
    precision: str | None = None
    seed: int = 0
    measures: bool = True


class Loop:
    """Runs windows and makes their updates.

    A gradient is (sum of losses) / (sum of weights). The sum of weights is known when the window is over, so backward
    scales by a `unit` that all processes share, and the boundary corrects by unit / weight. For losses weighted by
    samples the unit is that very weight, and there is nothing to correct.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        options: LoopOptions,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.strategy = strategy
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.options = options
        self.lr = 0.0
        """The learning rate that the last update was made with (of the first parameter group)."""
        self._loss_scale = LossScale(2.0**16 if options.precision == "fp16" else 1.0)
        self._epoch, self._key = -1, 0
        self.host_randomness = None if interrupts is None else HostRandomness(options.seed, strategy.data_parallel_rank)
        self.sums = Sums(1.0, options.measures)
        """What the window's losses add up to."""
        self._is_alone = strategy.processes == 1
        self._skips_nonfinite = options.skip_nonfinite_updates or options.precision == "fp16"
        self._wants_norm = bool(self._skips_nonfinite or options.gradient_clip_norm or options.measures)
        self._norm = math.nan  # of the update before
        self._busy = self._began = self._last_began = 0.0
        self.meter = _meter(strategy) if options.measures else None
        """Where the time of updates goes; None where nobody listens."""
        self._rows: list[list[float]] = []  # of the last message
        self._late_weight = 0.0  # the weight of the update before, where it was not what was expected
        self._interrupts = interrupts or Interrupts()
        self._restores_buffers = interrupts is not None and any(True for _ in model.buffers())
        self._buffers: dict[str, Tensor] = {}

    def run_update(
        self, compute: Compute, window: Window, epoch: int, update: int, wishes: Wishes = NOTHING
    ) -> Outcome:
        """Run one window of `compute(model, batch)` and make its update, the same on all processes.

        A process that is interrupted meanwhile makes all of them drop the window: the outcome is `aborted`.

        Raises ValueError for a loss or weight that is none, what `compute` or its data raised, and
        ProcessFailureError on the other processes in that case.
        """

        self.start(window, epoch, update, wishes)
        interrupts, seed, key, meter = self._interrupts, self.strategy.seed, self._key, self.meter
        model, add = self.model, self.sums.add
        is_timed = meter is not None and meter.sees_reduction

        def forward(micro: MicroBatch) -> tuple[Tensor, float]:
            if interrupts.requested:
                raise Interrupted
            if is_timed and micro.is_last:
                self._last_began = time.perf_counter()
            seed(key + micro.seed_index * ODD & SEED_BITS)
            weighed = add(compute(model, micro.batch), micro)  # what `weigh` does, less a call per micro-batch
            if micro.is_last:
                self._send()
            return weighed

        micros = window if meter is None or window.is_empty else meter.watched(window, update)
        try:
            self.strategy.run_window(micros, forward)
        except Interrupted:
            self._send()
            self.strategy.join(window)
        except Exception as error:
            self._fail(window, error)
            raise
        if self._receive is None:  # the losses are computed on another process
            self._send()
        return self.finish(window, update)

    def start(self, window: Window, epoch: int, update: int, wishes: Wishes = NOTHING) -> None:
        """Begin a window: nothing is summed yet."""
        self._expected = float(window.samples or window.stage.effective_batch)
        self._unit = 2.0 ** round(math.log2(self._late_weight)) if self._late_weight else self._expected
        self._window, self._wishes = window, wishes
        self._receive: PendingRows | None = None
        self.sums = Sums(self._loss_scale.value / self._unit, self.options.measures)
        if self._restores_buffers:
            self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if epoch != self._epoch:
            self._epoch, self._key = epoch, epoch_key(self.options.seed, epoch)
        if self.host_randomness is not None:
            self.host_randomness.start_window(update)
        self.strategy.start_window(window.most_micro_batches)
        if not self._is_alone or self.meter is not None:
            self._began = self._last_began = time.perf_counter()
        if window.is_empty:
            self._send()

    def weigh(self, loss: Loss | Tensor, micro: MicroBatch) -> tuple[Tensor, float]:
        """Add a micro-batch's loss to the window's and return what backward needs: the tensor, and its scale."""
        weighed = self.sums.add(loss, micro)
        if micro.is_last:
            self._send()
        return weighed

    def seed(self, micro: MicroBatch) -> None:
        """Seed what the forward of a micro-batch draws from: it begins."""
        if micro.is_last:
            self._last_began = time.perf_counter()
        self.strategy.seed(self._key + micro.seed_index * ODD & SEED_BITS)

    def finish(self, window: Window, update: int) -> Outcome:
        """Correct, clip, step: once per window, the same on all processes."""
        facts = self._agreed(update)
        reduced = time.perf_counter() if self.meter is not None else 0.0
        if facts.abort:
            return self._drop()
        if update == 0:
            check_gradients(self.model.named_parameters())
        window.more, window.samples = facts.more > 0, int(facts.samples)
        correction = self._unit / facts.weight if facts.weight else 1.0
        factor = correction / self._loss_scale.value
        norm = math.nan
        if self._wants_norm or factor != 1.0:
            norm_tensor = self.strategy.clip(self.options.gradient_clip_norm, factor)
            if self._wants_norm:
                norm = norm_tensor.item()
        self._norm = norm
        overflowed = self._skips_nonfinite and not math.isfinite(norm)
        skipped = overflowed or facts.weight == 0
        lr_factor = window.stage.lr_factor
        if not skipped and lr_factor == 1.0:
            self.optimizer.step()
        elif not skipped:
            self._step(lr_factor)
        if self.options.precision == "fp16":
            self._loss_scale.update(overflowed)
        self.lr = lr_factor * float(self.optimizer.param_groups[0]["lr"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.strategy.clear_gradients()
        if facts.weight:
            self._late_weight = facts.weight if facts.weight != self._expected else 0.0
        if self.meter is not None and self.sums.micro_batches == (K := window.stage.accumulate_grad_batches):
            self.meter.add(K, self._began, self._last_began, reduced, time.perf_counter())
        mean = facts.loss / facts.weight if self.options.measures and facts.weight else math.nan
        return Outcome(
            facts.weight, mean, int(facts.samples), norm, skipped, overflowed, facts.stop > 0, facts.save > 0
        )

    def _step(self, lr_factor: float) -> None:
        """Let the optimizer step with other learning rates, and put back those that its schedule goes on from."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = lr_factor * group["lr"]
        self.optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    @property
    def busy(self) -> list[float]:
        """Seconds that each process has spent by itself in windows so far, by rank; empty where there is only one."""
        return [Facts(*row).busy for row in self._rows]

    def state_dict(self) -> dict[str, Any]:
        """Return what the next update needs of those before."""
        scale = self._loss_scale
        return {"late_weight": self._late_weight, "norm": self._norm, "loss_scale": [scale.value, scale.quiet_updates]}

    def load_state_dict(self, state: Mapping[str, Any], has_same_precision: bool = True) -> None:
        """Take back what `state_dict` returned."""
        self._late_weight, self._norm = float(state["late_weight"]), float(state["norm"])
        if self.options.precision == "fp16" and has_same_precision:
            self._loss_scale.value, self._loss_scale.quiet_updates = state["loss_scale"]

    def _drop(self) -> Outcome:
        """Go back to the boundary before: gradients, and the buffers that forward has changed."""
        self.strategy.clear_gradients()
        if self.host_randomness is not None:
            self.host_randomness.drop()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])
        return Outcome(0.0, math.nan, 0, math.nan, False, False, stop=True, save=False, aborted=True)

    def _facts(self, failed: bool = False) -> Facts:
        """Read what the device has summed: the one place in a window where the host waits for it."""
        if failed:
            return Facts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, self._busy, self._norm)
        weight, loss = self.sums.read()
        if not self._is_alone:
            self._busy += time.perf_counter() - self._began
        wishes, abort = self._wishes, self._interrupts.requested
        more, samples = self._window.more, self.sums.samples
        return Facts(weight, loss, samples, more, wishes.stop, wishes.save, abort, 0.0, self._busy, self._norm)

    def _agreed(self, update: int) -> Facts:
        """Return the sums over all processes. Raises what they must hear of together."""
        if self._is_alone:
            return self._facts()
        if self._receive is None:
            raise ValueError("backward was not called for the window's last micro-batch: call it for each.")
        rows = self._rows = self._receive()
        facts = Facts(*map(total, zip(*rows, strict=True)))
        if facts.failed:
            raise self._other_failure(update)
        check_norms([row[-1] for row in rows], update)
        return facts

    def check_replicas(self, update: int) -> None:
        """Make sure that all processes hold the same parameters, to the bit. Raises ReplicaError on all of them.

        Reads every parameter, so it is for the ends of epochs. Norms are compared at each update, but gradients that
        were reduced are equal also where parameters are not.
        """
        if self._is_alone:
            return
        check_norms(self.strategy.gather(self._norm), update)
        if len(set(fingerprints := self.strategy.gather(self.strategy.fingerprint()))) > 1:
            listed = ", ".join(f"{value} on process {rank}" for rank, value in enumerate(fingerprints))
            raise ReplicaError(
                f"the processes' models have diverged: after update {update} their parameters' bits sum to {listed}. "
                f"{CAUSES}"
            )

    def _send(self, failed: bool = False) -> None:
        """Start the update's message, to travel while the last backward runs."""
        if not self._is_alone:
            self._receive = self.strategy.exchange(self._facts(failed))

    def _fail(self, window: Window, error: Exception) -> None:
        """Let the other processes finish the window, so that they hear of the error instead of waiting for this one.

        After this process's message it is too late for that: the last backward failed, and they will lose contact.
        """
        if self._is_alone or self._receive is not None or self.strategy.has_lost_contact(error):
            return
        self._send(failed=True)
        self.strategy.join(window)
        self.strategy.gather(f"{type(error).__name__}: {error}")

    def _other_failure(self, update: int) -> ProcessFailureError:
        failures = [(rank, text) for rank, text in enumerate(self.strategy.gather(None)) if text]
        return ProcessFailureError(
            "; ".join(f"process {rank} failed in update {update}: {text}" for rank, text in failures)
        )


def _meter(strategy: Strategy) -> Meter:
    is_deferred = strategy.defers_reduction and strategy.micro_batches is None
    return Meter(
        is_alone=strategy.processes == 1,
        sees_device=strategy.device.type == "cpu",
        defers=is_deferred and strategy.data_parallel_size > 1,
    )
