"""Windows of ready micro-batches: a stream on each process, of unknown length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from engine.data.counting import check_shares, digest, size_problem
from engine.data.lookahead import Lookahead, has_state
from engine.data.window import Loading, Positions, Window
from engine.errors import UserError
from engine.plan.schedule import Schedule
from engine.plan.windows import Plan
from engine.seeds import EPOCH_STREAM, mix
from strategies import MicroBatch

log = logging.getLogger("tally")

PIECE = 1 << 40
"""From a seed index of one piece of a micro-batch to that of the next."""


class StreamSource:
    """The windows of ready micro-batches: K of this process's own each, until all processes have run out."""

    def __init__(self, data: Iterable[Any], schedule: Schedule, loading: Loading) -> None:
        batching, strategy, prefetch = loading.batching, loading.strategy, loading.prefetch
        if isinstance(data, DataLoader) and strategy.data_parallel_size > 1:
            _refuse_shared_loader(data)
        self._data, self._schedule, self._seed = data, schedule, loading.seed
        self._batching, self._strategy = batching, strategy
        self._start = prefetch.start if prefetch else None
        self._to_device, self._batch_size = (prefetch or strategy).to_device, (prefetch or batching).batch_size
        self._has_compared = False
        self._length = 0  # micro-batches in the epoch before; 0 if unknown
        self._was_restored = False
        self._most, self._largest = 0, 1  # samples of a micro-batch: at most, if it is cut; and of the largest so far
        self.can_be_cut = prefetch is None and not isinstance(data, Iterator)
        """Whether an epoch can be read again, in smaller micro-batches."""

    def largest(self, window: Window) -> int:
        """Return the most samples that a micro-batch has had, on any process."""
        return int(max(self._strategy.gather(self._largest)))

    def cut(self, N: int, plan: Plan | None = None) -> None:
        """From the next call of `windows` on, let micro-batches have at most N samples: larger ones are cut."""
        self._most = self._largest = N

    def windows(self, epoch: int, update: int, samples: int, positions: Positions = None) -> Iterator[Window]:
        """Yield windows until all processes have run out. Raises UserError without data, or if they cannot resume."""
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
        stream = Lookahead(self._data, positions[rank] if positions else None, self._start)
        digests = self._check_first(epoch, stream) if positions is None else []
        problem = size_problem(self._batching, stream.ahead)
        first = rank if positions is None else int(positions[rank]["seed_index"])
        has_more = True
        while has_more:
            stage = self._schedule.at(epoch, update, samples)
            K = stage.accumulate_grad_batches
            seed_indices = range(first, first + P * K, P)
            position = {"epoch": epoch, "seed_index": seed_indices.stop, "length_before": self._length}
            window = Window(stage, K, not stream.has_next, position, has_more=stream.has_next)
            if window.is_empty:
                window.position |= stream.position
            window.micros = self._micros(window, stream, seed_indices, problem)
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

    def _micros(self, window: Window, stream: Lookahead, seed_indices: range, problem: str) -> Iterator[MicroBatch]:
        """Yield the next K micro-batches of a stream, and note what they leave in `window`."""
        to_device, batch_size, last = self._to_device, self._batch_size, seed_indices[-1]
        for index in seed_indices:
            if not stream.has_next:
                return
            batch = stream.take(index == last)
            window.has_more = has_more = stream.has_next
            if is_last := index == last or not has_more:
                window.position |= stream.position
            if (size := batch_size(batch)) > self._largest:
                if self._most:
                    yield from self._pieces(batch, size, index, is_last, problem)
                    continue
                self._largest = size
            yield MicroBatch(to_device(batch), size, index, is_last, problem)

    def _pieces(self, batch: Any, size: int, index: int, is_last: bool, problem: str) -> Iterator[MicroBatch]:
        """Yield a micro-batch in pieces, with seeds of their own. Raises UserError for pieces of other samples."""
        pieces = [*self._batching.split(batch, self._most)]
        sizes = [self._batch_size(piece) for piece in pieces]
        if sum(sizes) != size or max(sizes) > self._most:
            what = f"split() made pieces of {sizes} samples of a micro-batch of {size}"
            raise UserError(f"{what}: expected all of them, at most {self._most} in each. Give each sample once.")
        for number, piece in enumerate(pieces):
            is_end = is_last and number == len(pieces) - 1
            yield MicroBatch(self._to_device(piece), sizes[number], index + number * PIECE, is_end, problem)

    def _check_first(self, epoch: int, stream: Lookahead) -> list[str]:
        """Return the digests of the first micro-batches if two are equal. Raises UserError without any."""
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
        if self._was_restored and has_state(self._data) and self._length not in (0, length):
            log.warning(
                "process %d read %d micro-batches in epoch %d and %d in the epoch before, since the stream was "
                "restored by its load_state_dict: some may be lost or repeated. If they should be as many, use a "
                "map-style dataset, or a loader without state_dict, which is read again up to its position.",
                *(self._strategy.rank, length, epoch, self._length),
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
