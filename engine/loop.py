"""One update: the window's micro-batches, one message between the processes, and the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.checks import check_gradients
from engine.loss import Loss
from engine.precision import LossScale
from engine.randomness import ModelRandomness
from engine.window import Micro, Window
from strategies import Rows, Strategy

Compute = Callable[[nn.Module, Any], Loss | Tensor]
"""From the prepared model and a batch to the loss, as `Task.loss` does."""

TOO_NARROW = {torch.float16, torch.bfloat16}
"""Dtypes in which a sum of losses would lose digits."""


CAUSES = (
    "Do all of them train the same parameters, at the same learning rate, through the `model` that loss() is given, "
    "and does nothing else change it?"
)


class ProcessFailureError(RuntimeError):
    """Another process failed; the message names it and what it said."""


class ReplicaError(RuntimeError):
    """Processes that should hold the same gradient do not; the message names them and their norms."""


class Facts(NamedTuple):
    """What one process tells the others of its part in a window: one message of seven doubles an update."""

    weight: float
    loss: float
    samples: float
    more: float
    stop: float
    failed: float
    norm_before: float


class Outcome(NamedTuple):
    """What an update was, over all processes. `loss` is the mean; NaN where it is not measured or the weight is 0."""

    weight: float
    loss: float
    samples: int
    grad_norm: float
    skipped: bool
    stop: bool


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
    ) -> None:
        self.strategy = strategy
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.options = options
        self.lr = 0.0
        """The learning rate that the last update was made with (of the first parameter group)."""
        self._loss_scale = LossScale(2.0**16 if options.precision == "fp16" else 1.0)
        self.randomness = ModelRandomness(options.seed, model, strategy)
        self._is_alone = strategy.data_parallel_size == 1
        self._skips_nonfinite = options.skip_nonfinite_updates or options.precision == "fp16"
        self._wants_norm = bool(self._skips_nonfinite or options.gradient_clip_norm or options.measures)
        self._norm = math.nan  # of the update before
        self._late_weight = 0.0  # the weight of the update before, where it was not what was expected
        self._total = torch.zeros((), dtype=torch.float64, device=strategy.device)

    def run_update(
        self, compute: Compute, window: Window, epoch: int, update: int, wants_stop: bool = False
    ) -> Outcome:
        """Run one window of `compute(model, batch)` and make its update, the same on all processes.

        Raises ValueError for a loss or weight that is none, what `compute` or its data raised, and
        ProcessFailureError on the other processes in that case.
        """

        def forward(micro: Micro) -> tuple[Tensor, float]:
            self.randomness.seed(micro.place)
            return self.weigh(compute(self.model, micro.batch), micro)

        self.start(window, epoch, wants_stop)
        try:
            self.strategy.run_window(window, forward)
        except Exception as error:
            self._fail(window, update, error)
            raise
        return self.finish(window, update)

    def start(self, window: Window, epoch: int, wants_stop: bool = False) -> None:
        """Begin a window: nothing is summed yet."""
        self._expected = float(window.samples or window.stage.effective_batch)
        self._unit = 2.0 ** round(math.log2(self._late_weight)) if self._late_weight else self._expected
        self._scale = self._loss_scale.value / self._unit
        self._window, self._stop = window, wants_stop
        self._receive: Rows | None = None
        self._weight: float | Tensor = 0.0
        self._least_weight: Tensor | None = None
        self._samples = 0
        if self.options.measures:
            self._total.zero_()
        self.randomness.start_window(epoch)
        if window.is_empty:
            self._send()

    def weigh(self, loss: Loss | Tensor, micro: Micro) -> tuple[Tensor, float]:
        """Add a micro-batch's loss to the window's and return what backward needs: the tensor, and its scale."""
        if isinstance(loss, Tensor):  # the mean over the samples
            value, share = loss, micro.size
            self._weight += share
        elif isinstance(loss, Loss):
            value, share = loss.sum, 1
            if not isinstance(value, Tensor):
                raise ValueError(f"the loss's sum is a {type(value).__name__}: return Loss(sum, weight) with a tensor.")
            self._add_weight(loss.weight)
        else:
            raise ValueError(f"loss() returned {type(loss).__name__}: return a 0-dim tensor, or Loss(sum, weight).")
        if value.ndim or not value.requires_grad or value.dtype in TOO_NARROW:
            raise ValueError(_loss_message(value))
        self._samples += micro.size
        if self.options.measures:
            self._total.add_(value.detach(), alpha=share)
        if micro.is_last:
            self._send()
        return value, share * self._scale

    def finish(self, window: Window, update: int) -> Outcome:
        """Correct, clip, step: once per window, the same on all processes."""
        facts = self._agreed(update)
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
        if not skipped:
            self.optimizer.step()
        if self.options.precision == "fp16":
            self._loss_scale.update(overflowed)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.strategy.clear_gradients()
        if facts.weight:
            self._late_weight = facts.weight if facts.weight != self._expected else 0.0
        self.randomness.end_window()
        mean = facts.loss / facts.weight if self.options.measures and facts.weight else math.nan
        return Outcome(facts.weight, mean, int(facts.samples), norm, skipped, facts.stop > 0)

    def _add_weight(self, weight: float | Tensor) -> None:
        """Add a weight. Of those on the device keep the least (NaN, if there was one): they are looked at later."""
        if isinstance(weight, Tensor):
            if weight.ndim or weight.dtype in TOO_NARROW:
                raise ValueError(
                    f"a loss's weight is a {weight.dtype} of shape {tuple(weight.shape)}: give one number."
                )
            weight = weight.detach()
            self._least_weight = weight if self._least_weight is None else torch.minimum(self._least_weight, weight)
        elif not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(f"a micro-batch's loss has weight {weight}: weights are finite and not negative.")
        self._weight = self._weight + weight

    def _facts(self, failed: bool = False) -> Facts:
        """Read what the device has summed: the one place in a window where the host waits for it."""
        if failed:
            return Facts(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, self._norm)
        if self._least_weight is not None and not 0 <= (least := self._least_weight.item()) < math.inf:
            raise ValueError(f"a micro-batch's loss has weight {least}: weights are finite and not negative.")
        loss = self._total.item() if self.options.measures else math.nan
        return Facts(float(self._weight), loss, self._samples, self._window.more, self._stop, 0.0, self._norm)

    def _agreed(self, update: int) -> Facts:
        """Return the sums over all processes. Raises what they must hear of together."""
        if self._is_alone:
            return self._facts()
        if self._receive is None:
            raise ValueError("backward was not called for the window's last micro-batch: call it for each.")
        try:
            rows = self._receive()
        except RuntimeError as error:
            raise self._lost(update, error) from error
        facts = Facts(*map(math.fsum, zip(*rows, strict=True)))
        if facts.failed:
            raise self._other_failure(update)
        _check_norms([row[-1] for row in rows], update)
        return facts

    def check_replicas(self, update: int) -> None:
        """Make sure that all processes hold the same parameters, to the bit. Raises ReplicaError on all of them.

        Reads every parameter, so it is for the ends of epochs. Norms are compared at each update, but gradients that
        were reduced are equal also where parameters are not.
        """
        if self._is_alone:
            return
        _check_norms(self.strategy.gather(self._norm), update)
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

    def _fail(self, window: Window, update: int, error: Exception) -> None:
        """Let the other processes finish the window, so that they hear of the error instead of waiting for this one.

        After this process's message it is too late for that: the last backward failed, and the others will lose
        contact. They find what was posted.
        """
        if self._is_alone:
            return
        if self.strategy.has_lost_contact(error):
            raise self._lost(update, error) from error
        if self._receive is not None:
            self.strategy.post("failure", f"{type(error).__name__}: {error}")
            return
        self._send(failed=True)
        self.strategy.join(window)
        self.strategy.gather(f"{type(error).__name__}: {error}")

    def _other_failure(self, update: int) -> ProcessFailureError:
        failures = [(rank, text) for rank, text in enumerate(self.strategy.gather(None)) if text]
        return ProcessFailureError(
            "; ".join(f"process {rank} failed in update {update}: {text}" for rank, text in failures)
        )


    def _lost(self, update: int, error: Exception) -> ProcessFailureError:
        said = "; ".join(f"process {rank} failed: {text}" for rank, text in self.strategy.posted("failure").items())
        return ProcessFailureError(f"lost contact with another process in update {update}. {said or error}")


def _check_norms(norms: Sequence[float], update: int) -> None:
    """Compare the gradient norms of the update before `update`. Raises ReplicaError where one differs.

    By more than one part in a million: unlike devices may add up the same gradient in another order.
    """
    first = norms[0]
    if not all(math.isclose(n, first, rel_tol=1e-6) or (math.isnan(n) and math.isnan(first)) for n in norms):
        listed = ", ".join(f"{norm!r} on process {rank}" for rank, norm in enumerate(norms))
        raise ReplicaError(
            f"the processes' models have diverged: the gradient norm of update {update - 1} is {listed}. {CAUSES}"
        )


def _loss_message(value: Tensor) -> str:
    if value.ndim:
        return f"the loss has shape {tuple(value.shape)}: return a 0-dim tensor (a mean), or Loss(sum, weight)."
    if not value.requires_grad:
        return "the loss does not require grad: compute it from the model's output, without detach() or no_grad()."
    return f"the loss is {value.dtype}: sum losses in float32 or wider, as in `loss.float()`."
