"""The per-update message between processes, and what they agree on by it.

A message is a header of doubles: the fields of `Message` in their order. Sums, of a length that all processes have
agreed on, may follow it. It ends with three numbers of which the maxima are taken where many processes add messages
up: `slowness`, and the gradient norm of the update before and its negative. gloo aborts if lengths differ.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from engine.errors import ReplicaError

CAUSES = (
    "Do all of them train the same parameters, at the same learning rate, through the `model` that loss() is given, "
    "and does nothing else change it?"
)


class Message(NamedTuple):
    """One process's part in a window: the header of its message, eleven doubles per update."""

    weight: float = 0.0
    loss: float = 0.0  # the sum of its losses
    samples: float = 0.0
    has_more: float = 0.0  # whether it has data after this window
    stop: float = 0.0  # whether it requests the end of the run after this update
    save: float = 0.0  # whether it requests a checkpoint after this update
    abort: float = 0.0  # whether it was interrupted: this update is not made
    failed: float = 0.0
    has_new_names: float = 0.0  # whether it has logged a name that the processes have not agreed on
    out_of_memory: float = 0.0  # whether its memory ran out: the window runs again, in smaller micro-batches
    local_seconds: float = 0.0
    """Seconds of a window up to this message, on average of the last ten or so: nothing in them waits for others."""


HEADER = len(Message._fields)
MOST_PROCESSES = 1 << 20


class Slowest(NamedTuple):
    """The process that needs the longest for a window by itself."""

    process: int
    seconds: float
    others: float  # the mean of all others, in seconds


def slowness(seconds: float, rank: int) -> float:
    """Return one number of whole microseconds and rank: the largest one is that of the slowest process."""
    return 1e6 * seconds // 1 * MOST_PROCESSES + rank


def slowest(largest: float, seconds: float, processes: int) -> Slowest:
    """Return the process of the largest `slowness`, from that and the sum of the `seconds` of all."""
    microseconds, rank = divmod(largest, MOST_PROCESSES)
    return Slowest(int(rank), microseconds / 1e6, (seconds - microseconds / 1e6) / (processes - 1))


Agreed = Message  # the sums of those of all processes, without `local_seconds`


class Outcome(NamedTuple):
    """The result of an update, over all processes. `loss` is the mean; NaN if it is not recorded or the weight is 0."""

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
    out_of_memory: bool = False
    """It is aborted because memory ran out on a process: the window can run again, in smaller micro-batches."""
    metrics: Mapping[str, float] = MappingProxyType({})
    """The means of what was logged."""


class Requests(NamedTuple):
    """Requests of one process for after an update; all processes follow, or none."""

    stop: bool = False
    save: bool = False


NO_REQUESTS = Requests()


def agree(rows: Sequence[Sequence[float]]) -> Agreed:
    """Return the sums of messages."""
    return Agreed(*map(total, list(zip(*rows, strict=True))[: HEADER - 1]))


def total(values: Sequence[float]) -> float:
    """Return the sum, exactly rounded if it is finite, so that it does not depend on the order of processes."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # 1e308 + 1e308, or inf - inf
        return sum(values)


def differ(norms: Sequence[float]) -> bool:
    """Whether gradient norms differ, by more than one part in a million: unlike devices may sum in another order."""
    first = norms[0]
    return not all(math.isclose(n, first, rel_tol=1e-6) or (math.isnan(n) and math.isnan(first)) for n in norms)


def check_norms(norms: Sequence[float], update: int) -> None:
    """Compare the gradient norms of the update before `update`. Raises ReplicaError if one differs."""
    if differ(norms):
        listed = ", ".join(f"{norm!r} on process {rank}" for rank, norm in enumerate(norms))
        raise ReplicaError(f"the models have diverged: the gradient norm of update {update - 1} is {listed}. {CAUSES}")
