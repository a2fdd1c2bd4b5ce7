"""What the processes tell one another at each update, and what they do where they should agree and do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

CAUSES = (
    "Do all of them train the same parameters, at the same learning rate, through the `model` that loss() is given, "
    "and does nothing else change it?"
)


class ProcessFailureError(RuntimeError):
    """Another process failed; the message names it and what it said."""


class ReplicaError(RuntimeError):
    """Processes that should hold the same gradient do not; the message names them and their norms."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite; the message names the last good checkpoint."""


class Facts(NamedTuple):
    """What one process tells the others of its part in a window: one message of ten doubles an update."""

    weight: float
    loss: float
    samples: float
    more: float
    stop: float  # after this update
    save: float  # after this update
    abort: float  # before this update: it is not made
    failed: float
    busy: float  # seconds spent in windows so far, up to this message: nothing in them waits for another process
    norm_before: float


class Outcome(NamedTuple):
    """What an update was, over all processes. `loss` is the mean; NaN where it is not measured or the weight is 0."""

    weight: float
    loss: float
    samples: int
    grad_norm: float
    skipped: bool
    overflowed: bool
    stop: bool
    save: bool
    aborted: bool = False
    """A process was interrupted, and all stay at the boundary before: nothing has changed."""


class Wishes(NamedTuple):
    """What a process would have happen after an update; it happens on all, or on none."""

    stop: bool = False
    save: bool = False


NOTHING = Wishes()


def total(values: Sequence[float]) -> float:
    """Return the sum, exactly rounded where it is finite: the same for any number of processes."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # 1e308 + 1e308, or inf - inf
        return sum(values)


def check_norms(norms: Sequence[float], update: int) -> None:
    """Compare the gradient norms of the update before `update`. Raises ReplicaError where one differs.

    By more than one part in a million: unlike devices may add up the same gradient in another order.
    """
    first = norms[0]
    if not all(math.isclose(n, first, rel_tol=1e-6) or (math.isnan(n) and math.isnan(first)) for n in norms):
        listed = ", ".join(f"{norm!r} on process {rank}" for rank, norm in enumerate(norms))
        raise ReplicaError(
            f"the processes' models have diverged: the gradient norm of update {update - 1} is {listed}. {CAUSES}"
        )
