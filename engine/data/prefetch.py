"""Batches that move to the device while the one before is computed with: one ahead, on a stream of their own."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from engine.data.lookahead import Lookahead
from engine.errors import UserError
from engine.task import Batching
from strategies import Strategy


class Moving(NamedTuple):
    """A batch on its way: as it was, as it will be on the device, and the event of its arrival."""

    host: Any
    moved: Any
    arrival: Any


class Prefetch:
    """Begins to move a batch, and lets the computation wait for it. Raises UserError for a device without streams.

    The host waits for neither where its memory is pinned. A copy begins when all that was computed before is done, and
    a batch is kept here until then: so what a copy overwrites has been read, whatever the batch is made of.
    """

    def __init__(self, strategy: Strategy, batching: Batching) -> None:
        self._strategy, self._batching = strategy, batching
        self._backend: Any = torch.get_device_module(strategy.device)
        if not hasattr(self._backend, "Stream"):
            raise UserError(f"prefetch_to_device=True: torch has no streams for {strategy.device}: leave it out.")
        self._stream = self._backend.Stream(strategy.device)
        self._being_read: list[Any] = []

    def start(self, batch: Any) -> Moving:
        """Begin to move `batch`."""
        self._stream.wait_stream(self._computing)
        self._being_read.clear()
        with self._backend.stream(self._stream):
            return Moving(batch, self._strategy.to_device(batch), self._stream.record_event())

    def to_device(self, moving: Moving) -> Any:
        """Return the batch on the device: what is computed from now on waits until it is there."""
        self._computing.wait_event(moving.arrival)
        self._being_read.append(moving.moved)
        return moving.moved

    def batch_size(self, moving: Moving) -> int:
        """Return the number of samples in a batch: see `Batching.batch_size`."""
        return self._batching.batch_size(moving.host)

    def one_ahead(self, batches: Iterator[Any]) -> Iterator[Moving]:
        """Yield `batches`, each when the next one has begun to move; an exception met there comes at its turn."""
        ahead = Lookahead(batches, begin=self.start)
        while ahead.has_next:
            yield ahead.take()

    @property
    def _computing(self) -> Any:
        """The stream on which the model computes."""
        return self._backend.current_stream(self._strategy.device)


class OnHost(Prefetch):
    """Moves nothing: the batches of a window are counted on the host first."""

    def __init__(self, batching: Batching) -> None:
        self.batch_size = batching.batch_size  # type: ignore[assignment, method-assign]

    def start(self, batch: Any) -> Any:
        return batch

    to_device = one_ahead = start  # type: ignore[assignment]
