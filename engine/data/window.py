"""A window as one process sees it, and where windows come from.

Every source is used alike: `for window in source.windows(epoch, update)`, each window an iterable of this process's
micro-batches. A source knows nothing of models and updates; the loop tells a window, in `more`, whether any process
has another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from engine.plan.schedule import Stage
from strategies import MicroBatch


class Window(Protocol):
    """One window as this process sees it: iterate over it once for its micro-batches."""

    stage: Stage
    samples: int | None
    """Samples over all processes; of a stream it is known after the message of the update."""
    most_micro_batches: int
    """The most micro-batches that a process can have in it: the same number on all of them."""
    is_empty: bool
    """Whether this process has no micro-batch in it."""
    more: bool
    """Whether this process has data after it; after the message of the update, whether any process has."""

    def __iter__(self) -> Iterator[MicroBatch]: ...

    @property
    def position(self) -> Any:
        """Where this process's data stands after it: to be kept, and given to `Source.windows` to go on."""
        ...


class Source(Protocol):
    """Where the windows of an epoch come from."""

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield the windows of `epoch`, `update` updates and `samples` samples into the run.

        `positions` are those of all processes' last windows, by rank; None starts the epoch.
        """
        ...
