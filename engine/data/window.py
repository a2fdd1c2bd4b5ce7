"""Windows as one process sees them, and the sources that yield them. A source knows no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.data.prefetch import Prefetch
from engine.plan.schedule import Stage
from engine.plan.windows import Plan
from engine.task import Batching
from strategies import MicroBatch, Strategy

Positions = Sequence[Any] | None  # of all processes' last windows, by rank; None starts the epoch


@dataclass(frozen=True)
class Loading:
    """The loading of data as micro-batches; the last three are options of torch's DataLoader."""

    batching: Batching
    strategy: Strategy
    seed: int = 0
    prefetch: Prefetch | None = None
    shuffle: bool = True
    spread: bool = False
    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool = True


@dataclass
class Window:
    """One window as this process sees it: iterate over it once for its micro-batches."""

    stage: Stage
    most_micro_batches: int
    """The largest number of micro-batches that any process can have in it; the same number on all processes."""
    is_empty: bool  # whether this process has no micro-batch in it
    position: Any = None  # this process's position in its data after the window; `Source.windows` resumes from it
    samples: int | None = None  # samples over all processes; None for a stream until `close`
    has_more: bool = False  # whether this process has data after it; after `close`, whether any process has
    micros: Iterator[MicroBatch] = iter(())

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micros

    def close(self, has_more: bool, samples: int) -> None:
        """Take what all processes agreed on: whether any has more data, and the samples of the window."""
        self.has_more, self.samples = has_more, samples


class Source(Protocol):
    """A source of an epoch's windows."""

    can_be_cut: bool  # whether a window can run again in smaller micro-batches

    def largest(self, window: Window) -> int:
        """Return the most samples of a micro-batch in `window` on any process, or in those before."""
        ...

    def cut(self, N: int, plan: Plan | None = None) -> None:
        """Make micro-batches of at most N from the next call of `windows` on, in the windows of `plan` if given."""
        ...

    def windows(self, epoch: int, update: int, samples: int, positions: Positions = None) -> Iterator[Window]:
        """Yield the windows of `epoch`, `update` updates and `samples` samples into the run."""
        ...
