"""Windows of a map-style dataset: a global order, cut by the plan, of which each process fetches its own pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from engine.data.fetch import Fetch, Piece, TensorFetch
from engine.data.prefetch import Prefetch
from engine.data.window import Window
from engine.order import Order
from engine.plan.schedule import Stage
from engine.plan.windows import Plan
from engine.plan.windows import Window as PlannedWindow
from engine.signals import shielded
from engine.task import Batching
from strategies import MicroBatch, Strategy


@dataclass(frozen=True)
class LoaderOptions:
    """Options of torch's DataLoader for map-style data."""

    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool = True

    def build(self, fetch: Dataset[Any], pieces: Iterable[Piece], pin: bool) -> Any:
        """Return what iterates over these pieces, which `fetch` collates: a DataLoader where it has something to do."""
        pins = pin if self.pin_memory is None else self.pin_memory
        if not self.num_workers and not pins:
            return _InProcess(fetch, pieces)
        return DataLoader(
            fetch,
            batch_sampler=pieces,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=pins,
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
        spread: bool = False,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._order = order
        self._plan = plan
        self._cut = (N, strategy.data_parallel_rank, strategy.data_parallel_size, spread)
        self._prefetch = prefetch
        self._to_device = (prefetch or strategy).to_device
        self._pieces = _Pieces()
        in_memory = type(data) is TensorDataset and type(batching).collate is Batching.collate
        fetch = TensorFetch(data) if in_memory else Fetch(data, seed, batching.collate)
        self._loader = options.build(fetch, self._pieces, pin=strategy.device.type == "cuda")

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield the windows of `epoch`, from the position of process 0 on: it is that of all.

        Raises ValueError for an order that is longer or shorter than epoch 0's.
        """
        order = self._order(epoch)
        if len(order) != self._plan.samples:
            raise ValueError(
                f"the order of epoch {epoch} has {len(order)} samples, that of epoch 0 {self._plan.samples}: "
                "an order must be of one length in all epochs."
            )
        # where each micro-batch begins, counted in samples: a group holds several
        before = samples_before(order)
        offset = positions[0][1] if positions and positions[0][0] == epoch else 0
        windows = self._plan.windows(epoch, update, offset)
        self._pieces.now = _fetches(epoch, windows, self._cut, order, before)
        with shielded():
            batches = iter(self._loader)
        if self._prefetch is not None:
            batches = self._prefetch.one_ahead(batches)
        N, rank, P, spread = self._cut
        for window in self._plan.windows(epoch, update, offset):
            count = before[window.stop] - before[window.start]
            pieces = window.count(N, P, spread)
            micros, position = self._micros(batches, window, before), (epoch, window.stop)
            yield MapWindow(window.stage, count, -(-pieces // P), pieces <= rank, micros, position)

    def _micros(self, batches: Iterator[Any], window: PlannedWindow, before: Sequence[int]) -> Iterator[MicroBatch]:
        to_device = self._to_device
        for start, stop, is_last in window.micro_batches(*self._cut):
            yield MicroBatch(to_device(next(batches)), before[stop] - before[start], before[start], is_last)


def _fetches(
    epoch: int,
    windows: Iterable[PlannedWindow],
    cut: tuple[int, int, int, bool],
    order: Sequence[Any],
    before: Sequence[int],
) -> Iterator[Piece]:
    """Yield what one process fetches in an epoch."""
    is_grouped = not isinstance(before, range)
    for window in windows:
        for start, stop, _ in window.micro_batches(*cut):
            chosen: Any = order[start:stop]
            if is_grouped:
                chosen = list(chain.from_iterable(chosen))
            indices = chosen.tolist() if hasattr(chosen, "tolist") else list(chosen)
            yield Piece(epoch, before[start], indices)


def samples_before(order: Sequence[Any]) -> Sequence[int]:
    """For each position of an order, the samples before it: the position itself, unless groups are ordered."""
    if isinstance(order[0], Sequence):
        return list(accumulate(map(len, order), initial=0))
    return range(len(order) + 1)


@dataclass
class MapWindow:
    """A window of a map-style dataset."""

    stage: Stage
    samples: int | None
    most_micro_batches: int
    is_empty: bool
    micros: Iterator[MicroBatch]
    position: tuple[int, int]
    """The epoch, and the place in its order."""
    more: bool = False  # the plan knows

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micros


class _Pieces:
    """The DataLoader's batch sampler: what it yields is changed at each epoch."""

    now: Iterator[Piece] = iter(())

    def __iter__(self) -> Iterator[Piece]:
        return self.now


@dataclass
class _InProcess:
    """What a DataLoader without workers does, less a profiler's range for each piece."""

    fetch: Any
    pieces: Iterable[Piece]

    def __iter__(self) -> Iterator[Any]:
        return map(self.fetch.__getitems__, self.pieces)


def _as_it_is(batch: Any) -> Any:
    return batch
