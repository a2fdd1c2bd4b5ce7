"""Windows of ready micro-batches: a stream on each process, of unknown length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from engine.schedule import Schedule, Stage
from engine.task import Batching
from engine.window import Micro, Window
from strategies import Strategy


class StreamSource:
    """The windows of ready micro-batches: K of this process's own each, fewer where its stream ends.

    One micro-batch of lookahead tells which is the last. The epoch ends when all processes have run out.
    """

    def __init__(self, data: Iterable[Any], schedule: Schedule, batching: Batching, strategy: Strategy) -> None:
        if isinstance(data, DataLoader) and strategy.data_parallel_size > 1:
            _refuse_shared_loader(data)
        self._data = data
        self._schedule = schedule
        self._batching = batching
        self._strategy = strategy
        self._samples = 0  # over all processes since the start

    def windows(self, epoch: int, update: int) -> Iterator[Window]:
        """Yield windows until all processes have run out. Raises ValueError where none has a single micro-batch."""
        for part in (self._data, _sampler(self._data), getattr(self._data, "batch_sampler", None)):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        stream = _Lookahead(self._data)
        if not any(self._strategy.gather(stream.has_next)):
            raise ValueError(
                f"train_data() has no micro-batch in epoch {epoch}, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts anew."
            )
        place, P = self._strategy.data_parallel_rank, self._strategy.data_parallel_size
        more = True
        while more:
            stage = self._schedule.at(epoch, update, self._samples)
            places = range(place, place + P * stage.accumulate_grad_batches, P)
            window = StreamWindow(stage, stream, places, self._strategy.to_device, self._batching)
            yield window
            more, update, place = window.more, update + 1, places.stop
            self._samples += window.samples or 0


class StreamWindow:
    """The next K micro-batches of a stream."""

    samples: int | None = None

    def __init__(
        self, stage: Stage, stream: _Lookahead, places: range, to_device: Callable[[Any], Any], batching: Batching
    ) -> None:
        self.stage = stage
        self.is_empty = not stream.has_next
        self.more = stream.has_next
        self._stream, self._places, self._to_device, self._batching = stream, places, to_device, batching

    def __iter__(self) -> Iterator[Micro]:
        stream, to_device, batch_size = self._stream, self._to_device, self._batching.batch_size
        last = self._places[-1]
        for place in self._places:
            if not stream.has_next:
                return
            batch = stream.take()
            self.more = stream.has_next
            yield Micro(to_device(batch), batch_size(batch), place, place == last or not self.more)


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


def _sampler(loader: Any) -> Any:
    """What decides which samples a DataLoader reads."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)


def _refuse_shared_loader(loader: DataLoader[Any]) -> None:
    sampler = type(_sampler(loader))
    is_torch_s = sampler.__module__.startswith("torch.utils.data") and sampler is not DistributedSampler
    if is_torch_s and not isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "train_data() returned a DataLoader that gives every process all samples: each would be trained on once "
            "per process. Return the dataset itself, and the engine shares it out, or give the DataLoader a "
            "DistributedSampler."
        )
