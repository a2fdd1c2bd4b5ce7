"""The strategy's part in messages between processes, on their hosts: facts, texts and failures, not gradients."""

from collections.abc import Callable, Sequence
from typing import Any

PendingRows = Callable[[], list[list[float]]]
"""A started exchange: call it to wait for it, and to get each process's values in rank order, or one row of sums."""


class HostMessages:
    """The messages of a strategy. Every method has a default for one process; all others need `gather` at least."""

    def exchange(self, values: Sequence[float]) -> PendingRows:
        """Start sending a few host numbers to all processes; call the returned function to wait for all rows.

        Many processes may return a single row: the sums of all values but the last three, and the maxima of these.
        """
        row = list(values)
        return lambda: [row]

    def gather(self, value: Any) -> list[Any]:
        """Return each process's `value` (any picklable object) in rank order. Slow: use it outside the loop."""
        return [value]

    def collect(self, value: Any) -> list[Any]:
        """Return each process's `value` in rank order on process 0; what the others get is not specified."""
        return self.gather(value)

    def first(self, value: Any) -> Any:
        """Return the `value` of process 0."""
        return self.gather(value)[0]

    def compare(self, value: Any) -> list[Any]:
        """Return each process's `value` in rank order if their texts (`repr`) differ, else [value]."""
        return self.gather(value)

    def post(self, topic: str, text: str) -> None:
        """Publish a text that the others can read even if this process hangs; it replaces the one before."""

    def posted(self, topic: str) -> dict[int, str]:
        """Return the texts posted under `topic`, by rank, as far as they can still be read."""
        return {}

    def report(self, failure: str) -> None:
        """Publish that this process has failed, unless another has before it."""

    def reported(self) -> str:
        """Return which process was the first to fail, and how, as far as it can still be read; else ""."""
        return ""

    def has_lost_contact(self, error: Exception) -> bool:
        """Whether `error` means that another process is gone or has not answered in time."""
        return False

    def barrier(self) -> None:
        """Wait for all processes."""
