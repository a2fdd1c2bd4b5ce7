"""Losses that bring their weight: `torch.nn.functional`'s by name and arguments, returned as `Loss(sum, weight)`.

An update's gradient is that of torch's `reduction="mean"` over one batch of all its micro-batches and processes.
Sums are in float32 or wider; nothing waits for the device. Losses over a window are for `WindowTask.window_loss`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from engine.loss import Loss


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, label_smoothing: float = 0
) -> Loss:
    """Return the cross-entropy of scores (N, C, ...), with the C classes in dim 1.

    `target` (N, ...) has class numbers, of which `ignore_index` does not count, or (N, C, ...) probabilities. The
    loss's weight is the number of targets that count, each times the `weight` (C) of its class.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    weight = None if weight is None else _wide(weight)
    total = functional.cross_entropy(_wide(input), target, weight, reduction="sum", **options)
    if target.is_floating_point():
        return Loss(total, input.numel() // input.shape[min(1, input.ndim - 1)])
    return Loss(total, _counted(target, weight, ignore_index))


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100) -> Loss:
    """Return the negative log-likelihood of log-probabilities (N, C, ...): otherwise as `cross_entropy`."""
    weight = None if weight is None else _wide(weight)
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


def contrastive(first: Tensor, second: Tensor, scale: Tensor | float, tile: int = 4096) -> Tensor:
    """Return the symmetric contrastive loss of B pairs (CLIP, InfoNCE), a 0-dim tensor.

    `first` and `second` (B, features) are normalised by the caller; row i of one belongs to row i of the other. `scale`
    (one number) multiplies their dot products: the inverse temperature. Only `tile` rows of the B x B matrix exist at a
    time. Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """
    total = first.new_zeros(())
    for rows, columns in ((first, second), (second, first)):
        for start in range(0, len(rows), tile):
            args = rows[start : start + tile], columns, scale, start
            total = total + checkpoint(_tile, *args, use_reentrant=False)
    return total / (2 * len(first))


def load_balance(chances: Tensor, chosen: Tensor, tokens: Tensor | int) -> Tensor:
    """Return the load-balancing loss of a mixture of E experts, a 0-dim tensor: 1 if the router is balanced.

    `chances` (E) are the router's probabilities, summed over all tokens; `chosen` (E) counts the tokens that each
    expert got; `tokens` is their number. Source: Fedus et al., "Switch Transformers", 2021, equation 4.
    """
    return len(chances) * (chances / tokens * (chosen / tokens)).sum()


def _tile(rows: Tensor, columns: Tensor, scale: Tensor | float, start: int) -> Tensor:
    target = torch.arange(start, start + len(rows), device=rows.device)
    return functional.cross_entropy(scale * rows @ columns.T, target, reduction="sum")


def _counted(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the sum of the class weights of the targets that are not ignored: their number without weights."""
    target = target.long()  # in uint8, -100 is 156, and indexing takes a mask
    counts = target != ignore_index
    return counts.sum() if weight is None else (weight[target.masked_fill(~counts, 0)] * counts).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
