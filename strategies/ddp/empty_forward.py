"""The forward of a process without a micro-batch: it reads no data, and its gradients are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EmptyForward(nn.Module):
    """A forward without data: it returns zero, with gradient zero for `parameters`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._held = tuple(parameters)  # not registered: they belong to the model

    def forward(self) -> Tensor:
        """Return 0, as a function of the parameters."""
        total = self._held[0].new_zeros(())
        for parameter in self._held:
            total = total + _Zero.apply(parameter)  # type: ignore[no-untyped-call]
        return total


class _Zero(torch.autograd.Function):
    """Zero, with gradient zero: `p.sum() * 0` would be NaN for a parameter that is not finite."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])
