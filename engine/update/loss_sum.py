"""The sum of a window's losses and weights on one process."""

import math
from collections.abc import Mapping
from numbers import Real

import numpy
import torch
from torch import Tensor

from engine.errors import UserError
from engine.loss import TOO_NARROW, Loss, Terms
from strategies import MicroBatch


class LossSum:
    """Adds up weights and, if `is_recorded`, losses, on their device. Backward multiplies by `scale`."""

    def __init__(self, scale: float, is_recorded: bool) -> None:
        self.micro_batches = self.samples = 0  # micro-batches, and their samples, whose loss has been added
        self.scale, self.is_recorded = scale, is_recorded
        self._weight = 0.0
        self._device_weight: Tensor | None = None
        self._least_weight: Tensor | None = None
        self._losses: list[Tensor] = []
        self._share = 1

    def add(self, loss: Loss | Tensor | Terms, micro: MicroBatch) -> tuple[Tensor, float]:
        """Add a loss; return the tensor and the scale that backward needs. Raises UserError for an invalid one."""
        if isinstance(loss, Tensor):  # the mean over the samples
            value, share = loss, micro.size
            if micro.size_problem:
                raise UserError(micro.size_problem)
            self._weight += share
        elif isinstance(loss, Loss):
            value, share = loss.sum, 1
            if not isinstance(value, Tensor):
                raise UserError(f"Loss(sum, weight) has a {type(value).__name__} as sum: expected a tensor.")
            self._add_weight(loss.weight)
        else:
            more = " For several terms count weights() too, or use a TermTask." if isinstance(loss, Mapping) else ""
            what = f"loss() returned {type(loss).__name__}"
            raise UserError(f"{what}: expected a 0-dim tensor, or Loss(sum, weight).{more}")
        if value.dtype in TOO_NARROW or value.ndim or not value.requires_grad:
            raise UserError(_loss_message(value))
        self.samples += micro.size
        self.micro_batches += 1
        if self.is_recorded:
            self._add_loss(value.detach(), share)
        return value, share * self.scale

    def add_window(self, loss: Tensor, samples: int, micro_batches: int) -> None:
        """Add the loss of a whole window, with the weight of this process's samples."""
        self.samples, self.micro_batches, self._weight = samples, micro_batches, float(samples)
        if self.is_recorded and samples:
            self._losses, self._share = [loss], samples

    @property
    def weight(self) -> float | Tensor:
        """The sum of the weights so far, on the device if one of them is."""
        return self._weight if self._device_weight is None else self._weight + self._device_weight

    def read(self) -> tuple[float, float]:
        """Return (weight, loss): the one host-device sync of a window. Raises UserError for an invalid weight."""
        if self._least_weight is not None and not 0 <= (least := self._least_weight.item()) < math.inf:
            raise UserError(f"a micro-batch's loss has weight {least}: expected a finite number of at least 0.")
        loss = self._share * self._sum_of_losses().item() if self._losses else 0.0
        weight = self._weight if self._device_weight is None else self._weight + self._device_weight.item()
        return weight, loss

    def _add_weight(self, weight: float | Tensor) -> None:
        """Add a weight. Of those on the device keep the least (NaN, if there was one): `read` checks it."""
        if isinstance(weight, Tensor):
            if weight.ndim or weight.dtype in TOO_NARROW:
                kind = f"{weight.dtype} of shape {tuple(weight.shape)}"
                raise UserError(f"a loss's weight is a {kind}: expected one number, float32 or wider.")
            weight = weight.detach().double()  # integers would be summed in float32
            if self._device_weight is None or self._least_weight is None:
                self._device_weight = self._least_weight = weight
            else:
                self._device_weight = self._device_weight + weight
                self._least_weight = torch.minimum(self._least_weight, weight)
        elif not isinstance(weight, Real | numpy.bool_) or not 0 <= weight < math.inf:
            raise UserError(f"a micro-batch's loss has weight {weight}: expected a finite number of at least 0.")
        else:
            self._weight += float(weight)

    def _add_loss(self, value: Tensor, share: int) -> None:
        """Keep a loss in units of the first one's share; sixteen become one, so memory does not grow with K."""
        if not self._losses:
            self._share = share
        self._losses.append(value if share == self._share else value.double() * (share / self._share))
        if len(self._losses) == 16:
            self._losses = [self._sum_of_losses()]

    def _sum_of_losses(self) -> Tensor:
        return self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).sum(dtype=torch.float64)


def _loss_message(value: Tensor) -> str:
    if value.ndim:
        return f"the loss has shape {tuple(value.shape)}: expected a 0-dim tensor (a mean), or Loss(sum, weight)."
    if not value.requires_grad:
        return "the loss does not require grad. Compute it from the model's output, without detach() or no_grad()."
    return f"the loss is {value.dtype}: expected float32 or wider. Use loss.float()."
