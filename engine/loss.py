"""The loss of a micro-batch: a sum, and the weight that the sum is divided by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A sum of losses and its weight: an update's gradient is d(all sums) / (all weights), over all processes.

    `sum` is a 0-dim tensor, float32 or wider. `weight` counts what was summed (samples, valid tokens): an int, a
    float or a 0-dim tensor, not differentiated. Weight 0 is legal, for a micro-batch in which everything is masked;
    a negative weight, or one that is not finite, raises ValueError at the update. A mean term beside the sum goes into
    it as `term * weight`.
    """

    sum: Tensor
    weight: int | float | Tensor
