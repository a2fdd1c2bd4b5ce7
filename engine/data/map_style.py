"""Windows of a map-style dataset: a global order, cut by the plan; each process fetches its own pieces."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from engine.data.checks import check_order
from engine.data.counting import overrides, size_problem
from engine.data.fetch import Fetch, Piece, TensorFetch
from engine.data.prefetch import Prefetch
from engine.data.window import Closing, Window
from engine.errors import UserError
from engine.order import KeyedPermutation, Order
from engine.plan.schedule import Stage
from engine.plan.windows import Plan, PlannedWindow
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
        """Return an iterable over these pieces, which `fetch` collates: a DataLoader if workers or pinning need one."""
        pins = pin if self.pin_memory is None else self.pin_memory
        if not self.num_workers and not pins:
            return _InProcess(fetch, pieces)
        return DataLoader(
            fetch,
            batch_sampler=pieces,  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=pins,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            generator=torch.Generator(),  # its base seed must not come from the model's generator
        )


class MapSource:
    """The windows of a map-style dataset: a global order, cut by `plan`; this process fetches its own pieces only.

    `collate` names the method of `batching` that makes micro-batches; without one of that name its `collate` does.
    """

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
        collate: str = "collate",
    ) -> None:
        self._order = order
        self._plan = plan
        self._cut: tuple[int, int, int, bool] = (N, strategy.data_parallel_rank, strategy.data_parallel_size, spread)
        self._prefetch = prefetch
        self._to_device = (prefetch or strategy).to_device
        self._pieces = _PieceSampler()
        if not overrides(batching, collate):
            collate = "collate"
        collates = overrides(batching, collate)
        self._batching = batching if collates or overrides(batching, "batch_size") else None
        self._batch_size = (prefetch or batching).batch_size
        in_memory = type(data) is TensorDataset and not collates
        own = getattr(batching, collate)
        fetch = TensorFetch(data) if in_memory else Fetch(data, seed, own, seeds_samples=spread)
        self._loader = options.build(fetch, self._pieces, pin=strategy.device.type == "cuda")

    def cut(self, N: int, plan: Plan | None = None) -> None:
        """Make micro-batches of N from the next call of `windows` on, in the windows of `plan` if it is given."""
        self._cut = N, *self._cut[1:]
        self._plan = plan or self._plan

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield the windows of `epoch`, from the position of process 0 on: it is that of all.

        Raises UserError for an order that is longer or shorter than epoch 0's.
        """
        order = check_order(self._order(epoch))
        if len(order) != self._plan.samples:
            raise UserError(
                f"the order of epoch {epoch} has {len(order)} samples, that of epoch 0 {self._plan.samples}: "
                "an order must have the same length in all epochs."
            )
        # the first sample of each micro-batch, counted in samples: a group holds several
        before = samples_before(order)
        offset = positions[0][1] if positions and positions[0][0] == epoch else 0
        windows = self._plan.windows(epoch, update, offset)
        self._pieces.current = _fetches(epoch, windows, self._cut, order, before)
        with shielded():
            batches = iter(self._loader)
        if self._prefetch is not None:
            batches = self._prefetch.one_ahead(batches)
        N, rank, P, spread = self._cut
        for window in self._plan.windows(epoch, update, offset):
            count = before[window.stop] - before[window.start]
            pieces = window.count(N, P, spread)
            micros, position = self._micros(batches, window, before), (epoch, window.stop)
            has_more = window.stop < self._plan.samples
            yield MapWindow(window.stage, count, -(-pieces // P), pieces <= rank, micros, position, has_more)

    def _micros(self, batches: Iterator[Any], window: PlannedWindow, before: Sequence[int]) -> Iterator[MicroBatch]:
        to_device, batching = self._to_device, self._batching
        for start, stop, is_last in window.micro_batches(*self._cut):
            batch, size, problem = next(batches), before[stop] - before[start], ""
            if batching is not None:
                problem = size_problem(batching, batch, size)
                size = size if problem else self._batch_size(batch)
            yield MicroBatch(to_device(batch), size, before[start], is_last, problem)


def _fetches(
    epoch: int,
    windows: Iterable[PlannedWindow],
    cut: tuple[int, int, int, bool],
    order: Sequence[Any],
    before: Sequence[int],
) -> Iterator[Piece]:
    """Yield the pieces that one process fetches in an epoch."""
    if isinstance(order, KeyedPermutation):
        for start, indices in order.read(piece for window in windows for piece in window.micro_batches(*cut)):
            yield Piece(epoch, start, indices)
        return
    is_grouped = not isinstance(before, range)
    for window in windows:
        for start, stop, _ in window.micro_batches(*cut):
            chosen: Any = order[start:stop]
            if is_grouped:
                chosen = list(chain.from_iterable(chosen))
            indices = chosen.tolist() if hasattr(chosen, "tolist") else list(chosen)
            yield Piece(epoch, before[start], indices)


def samples_before(order: Sequence[Any]) -> Sequence[int]:
    """Return the samples before each position of an order: the position itself, unless the order holds groups."""
    if len(order) and isinstance(order[0], Sequence):
        return list(accumulate(map(len, order), initial=0))
    return range(len(order) + 1)


@dataclass
class MapWindow(Closing):
    """A window of a map-style dataset."""

    stage: Stage
    samples: int | None
    most_micro_batches: int
    is_empty: bool
    micros: Iterator[MicroBatch]
    position: tuple[int, int]
    """The epoch, and the offset in its order."""
    has_more: bool = False

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micros


class _PieceSampler:
    """The DataLoader's batch sampler; each epoch sets its pieces."""

    current: Iterator[Piece] = iter(())

    def __iter__(self) -> Iterator[Piece]:
        return self.current


@dataclass
class _InProcess:
    """A DataLoader without workers, and without its profiler range for each piece."""

    fetch: Any
    pieces: Iterable[Piece]

    def __iter__(self) -> Iterator[Any]:
        return map(self.fetch.__getitems__, self.pieces)


def _unchanged(batch: Any) -> Any:
    return batch
