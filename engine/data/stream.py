"""Windows of ready micro-batches: a stream on each process, of unknown length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from engine.data.counting import check_shares, digest, size_problem
from engine.data.prefetch import Prefetch
from engine.data.window import Closing, Window
from engine.errors import UserError
from engine.plan.schedule import Schedule, Stage
from engine.seeds import EPOCH_STREAM, mix
from engine.signals import shielded
from engine.task import Batching
from strategies import MicroBatch, Strategy

log = logging.getLogger("tally")


class StreamSource:
    """The windows of ready micro-batches: K of this process's own each, fewer where its stream ends.

    One micro-batch of lookahead tells which is the last. The epoch ends when all processes have run out.
    """

    def __init__(
        self,
        data: Iterable[Any],
        schedule: Schedule,
        batching: Batching,
        strategy: Strategy,
        seed: int = 0,
        prefetch: Prefetch | None = None,
    ) -> None:
        if isinstance(data, DataLoader) and strategy.data_parallel_size > 1:
            _refuse_shared_loader(data)
        self._data = data
        self._schedule = schedule
        self._batching = batching
        self._strategy = strategy
        self._seed = seed
        self._prefetch = prefetch
        self._has_compared = False
        self._length = 0  # micro-batches in the epoch before; 0 if unknown
        self._was_restored = False

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield windows until all processes have run out.

        Raises UserError if no process has a micro-batch, and for positions from which these processes cannot resume.
        """
        rank, P = self._strategy.data_parallel_rank, self._strategy.data_parallel_size
        if positions is not None and all(position["has_ended"] for position in positions):
            if positions[0]["epoch"] == epoch:
                return
            positions = None
        self._begin(epoch)
        if positions is not None:
            self._length, self._was_restored = int(positions[rank % len(positions)]["length_before"]), True
        if positions is not None and len(positions) != P:
            raise UserError(
                f"the run stopped in the middle of epoch {epoch}, where {len(positions)} processes read streams of "
                f"their own, and now there are {P}: resume with --nproc_per_node={len(positions)}, or from a "
                "checkpoint between two epochs."
            )
        prefetch = self._prefetch
        stream = Lookahead(self._data, positions[rank] if positions else None, prefetch.start if prefetch else None)
        to_device, batch_size = (prefetch or self._strategy).to_device, (prefetch or self._batching).batch_size
        digests = self._check_first(epoch, stream) if positions is None else []
        problem = size_problem(self._batching, stream.ahead)
        first = rank if positions is None else int(positions[rank]["seed_index"])
        has_more = True
        while has_more:
            stage = self._schedule.at(epoch, update, samples)
            seed_indices = range(first, first + P * stage.accumulate_grad_batches, P)
            window = StreamWindow(epoch, stage, stream, seed_indices, to_device, batch_size, problem, self._length)
            yield window
            has_more, update, first = window.has_more, update + 1, seed_indices.stop
            samples += window.samples or 0
            if digests:  # two first micro-batches were equal: only streams whose second windows are, too, are refused
                if has_more:
                    check_shares(self._strategy.gather(digest(stream.ahead)))
                else:
                    log.warning("two processes read the same first micro-batch, in an epoch of one window.")
                digests = []
        self._compare_length(epoch, stream.position["taken"])

    def _check_first(self, epoch: int, stream: Lookahead) -> list[str]:
        """Raise UserError if no process has a micro-batch.

        Return the digests of the first micro-batches if two processes begin their first epoch with the same.
        """
        compares = stream.has_next and not self._has_compared and self._strategy.data_parallel_size > 1
        firsts = self._strategy.gather((stream.has_next, digest(stream.ahead) if compares else ""))
        self._has_compared = True
        if not any(has_next for has_next, _ in firsts):
            raise UserError(
                f"train_data() has no micro-batch in epoch {epoch}, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts again."
            )
        digests = [value for _, value in firsts]
        return digests if len({*filter(None, digests)}) < len([*filter(None, digests)]) else []

    def _compare_length(self, epoch: int, length: int) -> None:
        """Warn if a stream that was restored by its own state gives other numbers of micro-batches in two epochs."""
        if self._was_restored and _has_state(self._data) and self._length not in (0, length):
            log.warning(
                "process %d read %d micro-batches in epoch %d and %d in the epoch before, since the stream was "
                "restored by its load_state_dict: some may be lost or repeated. If they should be as many, use a "
                "map-style dataset, or a loader without state_dict, which is read again up to its position.",
                self._strategy.rank,
                length,
                epoch,
                self._length,
            )
        self._length = length

    def _begin(self, epoch: int) -> None:
        """Give the epoch to every sampler and generator that shuffles."""
        data = self._data
        parts: list[Any] = [data, _sampler(data), *(getattr(data, name, None) for name in ("batch_sampler", "dataset"))]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(mix(self._seed, EPOCH_STREAM, epoch))  # so that a resumed run shuffles alike


class StreamWindow(Closing):
    """The next K micro-batches of a stream."""

    samples: int | None = None

    def __init__(
        self,
        epoch: int,
        stage: Stage,
        stream: Lookahead,
        seed_indices: range,
        to_device: Callable[[Any], Any],
        batch_size: Callable[[Any], int],
        size_problem: str,
        length_before: int,
    ) -> None:
        self._epoch, self._size_problem, self._length_before = epoch, size_problem, length_before
        self.stage = stage
        self.most_micro_batches = stage.accumulate_grad_batches
        self.is_empty = not stream.has_next
        self.has_more = stream.has_next
        self._stream, self._seed_indices, self._to_device, self._batch_size = (
            stream,
            seed_indices,
            to_device,
            batch_size,
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        stream, to_device, batch_size = self._stream, self._to_device, self._batch_size
        last, problem = self._seed_indices[-1], self._size_problem
        for index in self._seed_indices:
            if not stream.has_next:
                return
            batch = stream.take(index == last)
            has_more = self.has_more = stream.has_next
            yield MicroBatch(to_device(batch), batch_size(batch), index, index == last or not has_more, problem)

    @property
    def position(self) -> dict[str, Any]:
        """The seed index of this process's next window, where its stream stands, and the length of the epoch before."""
        here = {"epoch": self._epoch, "seed_index": self._seed_indices.stop, "length_before": self._length_before}
        return {**here, **self._stream.position}


class Lookahead:
    """An iterator that knows whether it has a next item; an exception met ahead comes when its item is asked for.

    It resumes from a `position` by the data's own `load_state_dict`, else by reading and dropping as many items.
    `begin` is applied to each item as soon as it is read.
    """

    def __init__(
        self,
        data: Any,
        position: Mapping[str, Any] | None = None,
        begin: Callable[[Any], Any] | None = None,
    ) -> None:
        self._data = data
        self._has_state = _has_state(data)
        self._state: Any = None
        self._error: Exception | None = None
        self._item: Any = None
        self._taken = 0
        self.has_next = True
        if position is not None and position["has_ended"]:
            self.has_next = False
            return
        try:
            if position is not None and self._has_state:
                data.load_state_dict(position["state"])
            self._keep_state()
            with shielded():  # the first read, too: a generator starts its loader's workers in it
                items = iter(data)
                self._items: Iterator[Any] = chain(list(islice(items, 1)), items)
            if position is not None and not self._has_state:
                self._skip(int(position["taken"]))
            if begin is not None:
                self._items = map(begin, self._items)
        except Exception as error:
            self._error = error
        else:
            self.take()
        self._taken = 0 if position is None else int(position["taken"])

    @property
    def ahead(self) -> Any:
        """The item that was read ahead; None if nothing was read, or an error in its place."""
        return self._item

    @property
    def position(self) -> dict[str, Any]:
        """The position of the stream before the item that was read ahead."""
        return {"taken": self._taken, "has_ended": not self.has_next, "state": self._state}

    def take(self, keeps_state: bool = False) -> Any:
        """Return the item that was read ahead, and read the next, keeping the data's state from between."""
        if self._error is not None:
            raise self._error
        item = self._item
        self._taken += 1
        if keeps_state:
            self._keep_state()
        try:
            self._item = next(self._items)
        except StopIteration:
            self.has_next = False
        except Exception as error:
            self._error = error
        return item

    def _keep_state(self) -> None:
        if self._has_state:
            self._state = deepcopy(self._data.state_dict())

    def _skip(self, count: int) -> None:
        log.warning(
            "reading %d micro-batches again and dropping them: the stream has no state_dict to resume from", count
        )
        for number in range(count):
            if next(self._items, self) is self:
                raise UserError(
                    f"the stream ended after {number} micro-batches, but {count} had been trained on. To resume, it "
                    "must yield the same ones again, or have state_dict and load_state_dict."
                )


def _has_state(data: object) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def _sampler(loader: Any) -> Any:
    """Return the sampler that decides which samples a DataLoader reads; None if a batch sampler does by itself."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader if batches is None else batches, "sampler", None)


def _refuse_shared_loader(loader: DataLoader[Any]) -> None:
    sampler = type(_sampler(loader))
    is_torchs_own = sampler.__module__.startswith("torch.utils.data") and sampler is not DistributedSampler
    if is_torchs_own and not isinstance(loader.dataset, IterableDataset):
        raise UserError(
            "train_data() returned a DataLoader that gives every process all samples: each would be trained on once "
            "per process. Return the dataset itself, and the engine shares it out, or give the DataLoader a "
            "DistributedSampler."
        )
