"""Windows as one process sees them, and the sources that yield them.

Every source is used alike: `for window in source.windows(epoch, update, samples)`, each window an iterable of this
process's micro-batches. A source knows no model and no optimizer; `Window.close` brings it the update's verdict.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from engine.plan.schedule import Stage
from strategies import MicroBatch


class Window(Protocol):
    """One window as this process sees it: iterate over it once for its micro-batches."""

    stage: Stage
    samples: int | None
    """Samples over all processes; None for a stream until `close`."""
    most_micro_batches: int
    """The largest number of micro-batches that any process can have in it; the same number on all processes."""
    is_empty: bool
    """Whether this process has no micro-batch in it."""
    has_more: bool
    """Whether this process has data after it; after `close`, whether any process has."""

    def __iter__(self) -> Iterator[MicroBatch]: ...

    def close(self, has_more: bool, samples: int) -> None:
        """Take what all processes agreed on: whether any has more data, and the samples of the window."""
        ...

    @property
    def position(self) -> Any:
        """This process's position in its data after the window; `Source.windows` resumes from it."""
        ...


class Source(Protocol):
    """A source of an epoch's windows."""

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield the windows of `epoch`, `update` updates and `samples` samples into the run.

        `positions` are those of all processes' last windows, by rank; None starts the epoch.
        """
        ...


class Closing:
    """The verdict of an update, as a window keeps it."""

    has_more: bool
    samples: int | None

    def close(self, has_more: bool, samples: int) -> None:
        """Keep whether any process has more data, and the samples of the window."""
        self.has_more, self.samples = has_more, samples
