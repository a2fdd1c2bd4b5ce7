"""What the losses of a window add up to on one process."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from engine.loss import Loss
from strategies import MicroBatch

TOO_NARROW = {torch.float16, torch.bfloat16}
"""Dtypes in which a sum of losses would lose digits."""


class Sums:
    """Adds up losses and weights where they are: the host looks at the device once, when the window is over.

    `scale` is what backward multiplies a sum of losses by; `measures` says whether anybody wants to know that of all.
    """

    def __init__(self, scale: float, measures: bool) -> None:
        self.micro_batches = self.samples = 0
        """Those whose loss has been added."""
        self._scale, self._measures = scale, measures
        self._weight: float | Tensor = 0.0
        self._least_weight: Tensor | None = None
        self._losses: list[Tensor] = []
        self._share = 1

    def add(self, loss: Loss | Tensor, micro: MicroBatch) -> tuple[Tensor, float]:
        """Add a micro-batch's loss and return what backward needs: the tensor, and its scale.

        Raises ValueError for a loss or weight that is none.
        """
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
        if value.dtype in TOO_NARROW or (not self.micro_batches and (value.ndim or not value.requires_grad)):
            raise ValueError(_loss_message(value))
        self.samples += micro.size
        self.micro_batches += 1
        if self._measures:
            self._add_loss(value.detach(), share)
        return value, share * self._scale

    def read(self) -> tuple[float, float]:
        """Return (weight, loss): the one place in a window where the host waits for the device.

        Raises ValueError for a weight that is negative or not finite.
        """
        if self._least_weight is not None and not 0 <= (least := self._least_weight.item()) < math.inf:
            raise ValueError(f"a micro-batch's loss has weight {least}: weights are finite and not negative.")
        loss = self._share * self._sum_of_losses().item() if self._losses else 0.0
        return float(self._weight), loss

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

    def _add_loss(self, value: Tensor, share: int) -> None:
        """Keep a loss in units of the first one's share. Sixteen become one: a longer window keeps no more of them."""
        if not self._losses:
            self._share = share
        self._losses.append(value if share == self._share else value.double() * (share / self._share))
        if len(self._losses) == 16:
            self._losses = [self._sum_of_losses()]

    def _sum_of_losses(self) -> Tensor:
        return self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).sum(dtype=torch.float64)


def _loss_message(value: Tensor) -> str:
    if value.ndim:
        return f"the loss has shape {tuple(value.shape)}: return a 0-dim tensor (a mean), or Loss(sum, weight)."
    if not value.requires_grad:
        return "the loss does not require grad: compute it from the model's output, without detach() or no_grad()."
    return f"the loss is {value.dtype}: sum losses in float32 or wider, as in `loss.float()`."
