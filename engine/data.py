"""Data as windows: what an epoch yields to the loop, from a map-style dataset or from ready micro-batches.

Both sources are used alike: `for window in source.windows(epoch, update)`, each window an iterable of this process's
micro-batches. A source knows nothing of models and updates; the loop tells a window, in `more`, whether any process
has another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from engine.fetch import Fetch, Piece, TensorFetch
from engine.order import Order
from engine.plan import Plan
from engine.schedule import Schedule, Stage
from engine.task import Task
from strategies import Strategy


class Micro(NamedTuple):
    """One micro-batch: its data on the device, its samples, its place in the epoch, and whether the update follows."""

    batch: Any
    size: int
    place: int
    is_last: bool


class Window(Protocol):
    """One window as this process sees it: iterate over it once for its micro-batches."""

    stage: Stage
    samples: int | None
    """Samples over all processes; of a stream it is known after the message of the update."""
    is_empty: bool
    """Whether this process has no micro-batch in it."""
    more: bool
    """Whether this process has data after it; after the message of the update, whether any process has."""

    def __iter__(self) -> Iterator[Micro]: ...


class Source(Protocol):
    """Where the windows of an epoch come from."""

    def windows(self, epoch: int, update: int) -> Iterator[Window]:
        """Yield the windows of `epoch`, `update` updates into the run."""
        ...


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


def is_map_style(data: object) -> bool:
    """Whether the engine makes the micro-batches of `data`: it has `__getitem__` and `__len__`.

    Raises ValueError for what is neither that nor an iterable of ready micro-batches.
    """
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"{type(data).__name__} is an IterableDataset of samples: return DataLoader(it, batch_size=N), or, "
            "where it yields ready micro-batches, DataLoader(it, batch_size=None)."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return True
    if hasattr(data, "__iter__"):
        return False
    raise ValueError(
        f"data of type {type(data).__name__}: return a map-style dataset, or an iterable of micro-batches."
    )


class MapSource:
    """The windows of a map-style dataset: a global order, cut by `plan`; this process fetches its own pieces only."""

    def __init__(
        self,
        data: Any,
        order: Order,
        plan: Plan,
        N: int,
        task: Task,
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
        in_memory = type(data) is TensorDataset and type(task).collate is Task.collate
        fetch = TensorFetch(data) if in_memory else Fetch(data, seed)
        collate = _as_it_is if in_memory else task.collate
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


class StreamSource:
    """The windows of ready micro-batches: K of this process's own each, fewer where its stream ends.

    One micro-batch of lookahead tells which is the last. The epoch ends when all processes have run out.
    """

    def __init__(self, data: Iterable[Any], schedule: Schedule, task: Task, strategy: Strategy) -> None:
        if isinstance(data, DataLoader) and strategy.data_parallel_size > 1:
            _refuse_shared_loader(data)
        self._data = data
        self._schedule = schedule
        self._task = task
        self._strategy = strategy
        self._samples = 0  # over all processes since the start

    def windows(self, epoch: int, update: int) -> Iterator[Window]:
        """Yield windows until all processes have run out. Raises ValueError where none has a single micro-batch."""
        for part in (self._data, getattr(self._data, "sampler", None), getattr(self._data, "batch_sampler", None)):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        stream = _Lookahead(self._data)
        if not any(self._strategy.gather(stream.has_next)):
            raise ValueError(
                f"train_data() has no micro-batch in epoch {epoch}, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts anew."
            )
        place = self._strategy.data_parallel_rank
        more = True
        while more:
            stage = self._schedule.at(self._schedule.place(epoch, update, self._samples))
            window = StreamWindow(stage, stream, self._task, self._strategy, place)
            yield window
            more, update = window.more, update + 1
            self._samples += window.samples or 0
            place += self._strategy.data_parallel_size * stage.accumulate_grad_batches


class StreamWindow:
    """The next K micro-batches of a stream."""

    samples: int | None = None

    def __init__(self, stage: Stage, stream: _Lookahead, task: Task, strategy: Strategy, place: int) -> None:
        self.stage = stage
        self.is_empty = not stream.has_next
        self.more = stream.has_next
        self._stream, self._task, self._strategy, self._place = stream, task, strategy, place

    def __iter__(self) -> Iterator[Micro]:
        P, stream = self._strategy.data_parallel_size, self._stream
        to_device, batch_size = self._strategy.to_device, self._task.batch_size
        end = self._place + P * self.stage.accumulate_grad_batches
        for place in range(self._place, end, P):
            if not stream.has_next:
                return
            batch = stream.take()
            self.more = stream.has_next
            yield Micro(to_device(batch), batch_size(batch), place, not self.more or place + P >= end)


class _Lookahead:
    """An iterator that knows whether it has a next item; an exception met ahead comes when its item is asked for."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._error: Exception | None = None
        self._item: Any = None
        self.has_next = True
        try:
            self._items = iter(data)
        except Exception as error:
            self._error = error
        else:
            self.take()

    def take(self) -> Any:
        """Return the item that was read ahead, and read the next."""
        if self._error is not None:
            raise self._error
        item = self._item
        try:
            self._item = next(self._items)
        except StopIteration:
            self.has_next = False
        except Exception as error:
            self._error = error
        return item


def _as_it_is(batch: Any) -> Any:
    return batch


def _refuse_shared_loader(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset):
        return
    if type(loader.sampler) in (SequentialSampler, RandomSampler) and type(loader.batch_sampler).__module__.startswith(
        "torch."
    ):
        raise ValueError(
            "train_data() returned a DataLoader that gives every process all samples: each would be trained on once "
            "per process. Return the dataset itself, and the engine shares it out, or give the DataLoader a "
            "DistributedSampler."
        )
