"""The strategy's part in messages between processes, on their hosts: facts, texts and failures, not gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PendingRows = Callable[[], list[list[float]]]
"""A started exchange: call it to wait for it and to get each process's values, in rank order."""


class HostMessages(ABC):
    """The messages of a strategy. Every method has a default for one process; all others need `gather` at least."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of this process's model and batches."""

    def exchange(self, values: Sequence[float]) -> PendingRows:
        """Start sending a few host numbers to all processes; call the returned function to wait for all rows."""
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

    def gather_bytes(self, data: Tensor, most: int) -> list[Tensor]:
        """Return each process's bytes in rank order, on the device. At most `most`; may be padded to it."""
        return [row.to(self.device) for row in self.gather(data.cpu())]

    def post(self, topic: str, text: str) -> None:
        """Publish a text that the others can read even if this process hangs; it replaces the one before."""

    def posted(self, topic: str) -> dict[int, str]:
        """Return the texts posted under `topic`, by rank, as far as they can still be read."""
        return {}

    def report(self, failure: str) -> None:
        """Publish that this process has failed, for those that wait for it. The first one that reports is enough."""
        self.post("failure", failure)

    def reported(self) -> dict[int, str]:
        """Return the failures that were reported, by rank, as far as they can still be read."""
        return self.posted("failure")

    def has_lost_contact(self, error: Exception) -> bool:
        """Whether `error` means that another process is gone or has not answered in time."""
        return False

    def barrier(self) -> None:
        """Wait for all processes."""
