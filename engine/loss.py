"""The loss of a micro-batch: a sum, and the weight that the sum is divided by."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError

TOO_NARROW = {torch.float16, torch.bfloat16}  # a sum of losses would lose digits in them


class Loss(NamedTuple):
    """A sum of losses and its weight: an update's gradient is d(all sums) / (all weights), over all processes.

    `sum` is a 0-dim tensor, float32 or wider. `weight` counts what was summed (samples, valid tokens): an int, a
    float or a 0-dim tensor, not differentiated; 0 if everything is masked. One that is negative or not finite raises
    ValueError at the update. A mean term beside the sum goes into it as `term * weight`.
    """

    sum: Tensor
    weight: int | float | Tensor


Terms = Mapping[str, Loss]
"""Losses by name, each divided by a weight of its own: an update's gradient is the sum of their gradients."""


def check_terms(terms: Any, expected: set[str] | None = None) -> Terms:
    """Return the terms of a micro-batch. Raises UserError for another thing, or other names than `expected`."""
    values = [*terms.values()] if isinstance(terms, Mapping) else []
    if not values or not all(isinstance(term, Loss) and isinstance(term.sum, Tensor) for term in values):
        what = f"loss() returned {type(terms).__name__}"
        raise UserError(f"{what}: expected its terms, a dict of Loss(sum, weight) by name with a tensor as sum.")
    if expected and terms.keys() != expected:
        names, others = sorted(terms), sorted(expected)
        raise UserError(f"loss() returned the terms {names}: expected {others}. Use weight 0 for what is missing.")
    return terms  # type: ignore[no-any-return]
