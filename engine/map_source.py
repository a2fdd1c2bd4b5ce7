"""Windows of a map-style dataset: a global order, cut by the plan, of which each process fetches its own pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from engine.fetch import Fetch, Piece, TensorFetch
from engine.order import Order
from engine.plan import Plan
from engine.schedule import Stage
from engine.task import Batching
from engine.window import Micro, Window
from strategies import Strategy


@dataclass(frozen=True)
class LoaderOptions:
    """Options of torch's DataLoader for map-style data."""

    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool = True

    def build(self, fetch: Dataset[Any], pieces: Iterable[Piece], collate: Callable[[Any], Any], pin: bool) -> Any:
        """Return the DataLoader that fetches and collates these pieces."""
        return DataLoader(
            fetch,
            batch_sampler=pieces,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=pin if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            generator=torch.Generator(),  # its base seed must not come from the model's generator
        )


class MapSource:
    """The windows of a map-style dataset: a global order, cut by `plan`; this process fetches its own pieces only."""

    def __init__(
        self,
        data: Any,
        order: Order,
        plan: Plan,
        N: int,
        batching: Batching,
        strategy: Strategy,
        seed: int,
        options: LoaderOptions,
    ) -> None:
        self._order = order
        self._plan = plan
        self._N = N
        self._rank, self._P = strategy.data_parallel_rank, strategy.data_parallel_size
        self._to_device = strategy.to_device
        self._place = (0, 0)
        in_memory = type(data) is TensorDataset and type(batching).collate is Batching.collate
        fetch = TensorFetch(data) if in_memory else Fetch(data, seed)
        collate = _as_it_is if in_memory else batching.collate
        self._loader = options.build(fetch, _Pieces(self), collate, pin=strategy.device.type == "cuda")

    def windows(self, epoch: int, update: int) -> Iterator[Window]:
        """Yield the windows of `epoch`. Raises ValueError for an order that is longer or shorter than epoch 0's."""
        self._place = (epoch, update)
        batches = iter(self._loader)
        for planned in self._plan.windows(epoch, update):
            starts = planned.micro_batches(self._N, self._rank, self._P)
            yield MapWindow(planned.stage, planned.samples, not starts, self._micros(batches, starts, planned.stop))

    def _micros(self, batches: Iterator[Any], starts: range, stop: int) -> Iterator[Micro]:
        N, to_device = self._N, self._to_device
        for start in starts:
            yield Micro(to_device(next(batches)), min(N, stop - start), start, start == starts[-1])

    def pieces(self) -> Iterator[Piece]:
        """Yield what this process fetches in the current epoch."""
        epoch, update = self._place
        order = self._order(epoch)
        if len(order) != self._plan.samples:
            raise ValueError(
                f"the order of epoch {epoch} has {len(order)} samples, that of epoch 0 {self._plan.samples}: "
                "an order must be of one length in all epochs."
            )
        for window in self._plan.windows(epoch, update):
            for start in window.micro_batches(self._N, self._rank, self._P):
                yield Piece(epoch, start, list(order[start : min(start + self._N, window.stop)]))


@dataclass
class MapWindow:
    """A window of a map-style dataset."""

    stage: Stage
    samples: int | None
    is_empty: bool
    micros: Iterator[Micro]
    more: bool = False  # the plan knows

    def __iter__(self) -> Iterator[Micro]:
        return self.micros


class _Pieces:
    """The DataLoader's batch sampler: it is asked again at each epoch."""

    def __init__(self, source: MapSource) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Piece]:
        return self._source.pieces()


def _as_it_is(batch: Any) -> Any:
    return batch
