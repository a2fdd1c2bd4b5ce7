"""Losses that bring their weight: `torch.nn.functional`'s by name and arguments, returned as `Loss(sum, weight)`.

An update's gradient is that of torch's `reduction="mean"` over one batch of all its micro-batches and processes,
whatever is padded, ignored or weighted. Nothing waits for the device. Sums are in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.loss import Loss


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, label_smoothing: float = 0
) -> Loss:
    """Return the cross-entropy of scores (N, C, ...), with the C classes in dim 1.

    `target` (N, ...) has class numbers, of which `ignore_index` does not count, or (N, C, ...) probabilities. The
    loss's weight is the number of targets that count, each times the `weight` (C) of its class.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    total = functional.cross_entropy(_wide(input), target, weight, reduction="sum", **options)
    if target.is_floating_point():
        return Loss(total, input.numel() // input.shape[min(1, input.ndim - 1)])
    return Loss(total, _counted(target, weight, ignore_index))


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100) -> Loss:
    """Return the negative log-likelihood of log-probabilities (N, C, ...): otherwise as `cross_entropy`."""
    total = functional.nll_loss(_wide(input), target, weight, ignore_index=ignore_index, reduction="sum")
    return Loss(total, _counted(target, weight, ignore_index))


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, pos_weight: Tensor | None = None
) -> Loss:
    """Return the binary cross-entropy of logits; the loss's weight is the number of elements, as in torch."""
    options: dict[str, Any] = {"weight": weight, "pos_weight": pos_weight, "reduction": "none"}
    losses = functional.binary_cross_entropy_with_logits(_wide(input), target, **options)
    return Loss(losses.sum(), losses.numel())


def mse_loss(input: Tensor, target: Tensor) -> Loss:
    """Return the squared error; the loss's weight is the number of elements."""
    losses = functional.mse_loss(_wide(input), target, reduction="none")
    return Loss(losses.sum(), losses.numel())


def _counted(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the sum of the class weights of the targets that are not ignored: their number without weights."""
    counts = target != ignore_index
    return counts.sum() if weight is None else (weight[target.masked_fill(~counts, 0)] * counts).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
