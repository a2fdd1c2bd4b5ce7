"""Losses over a whole window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


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


def _tile(rows: Tensor, columns: Tensor, scale: Tensor | float, start: int) -> Tensor:
    target = torch.arange(start, start + len(rows), device=rows.device)
    return functional.cross_entropy(scale * rows @ columns.T, target, reduction="sum")


def load_balance(chances: Tensor, chosen: Tensor, tokens: Tensor | int) -> Tensor:
    """Return the load-balancing loss of a mixture of E experts, a 0-dim tensor: 1 if the router is balanced.

    `chances` (E) are the router's probabilities, summed over all tokens; `chosen` (E) counts the tokens that each
    expert got; `tokens` is their number. Source: Fedus et al., "Switch Transformers", 2021, equation 4.
    """
    return len(chances) * (chances / tokens * (chosen / tokens)).sum()
