"""Windows of a map-style dataset: a global order, cut by the plan; each process fetches its own pieces."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, tee
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from engine.collate import collated, only_stacks
from engine.data.checks import check_order
from engine.data.counting import overrides, size_problem
from engine.data.fetch import Fetch, Piece, TensorFetch
from engine.data.window import Loading, Positions, Window
from engine.errors import UserError
from engine.order import KeyedPermutation, Order
from engine.plan.windows import Plan, PlannedMicroBatch
from engine.signals import shielded
from strategies import MicroBatch


class MapSource:
    """This process's windows of a map-style dataset, cut by `plan`; `collate` names a method of `batching`."""

    can_be_cut = True

    def __init__(self, data: Any, order: Order, plan: Plan, N: int, loading: Loading, collate: str = "collate") -> None:
        batching, strategy, prefetch = loading.batching, loading.strategy, loading.prefetch
        self._order, self._plan, self._prefetch = order, plan, prefetch
        self._cut = N, strategy.data_parallel_rank, strategy.data_parallel_size, loading.spread
        self._to_device, self._batch_size = (prefetch or strategy).to_device, (prefetch or batching).batch_size
        self._pieces, self._loader = _PieceSampler(), None
        collate = collate if overrides(batching, collate) else "collate"
        collates = overrides(batching, collate)
        self._batching = batching if collates or overrides(batching, "batch_size") else None
        in_memory = type(data) is TensorDataset and not collates and only_stacks(data.tensors)
        own = getattr(batching, collate) if collates else collated  # a worker need not be sent the task for that
        self._fetch = TensorFetch(data) if in_memory else Fetch(data, loading.seed, own, seeds_each=loading.spread)
        pins = strategy.device.type == "cuda" if loading.pin_memory is None else loading.pin_memory
        workers = loading.num_workers
        if workers or pins:  # it costs a profiler range for each piece
            self._loader = DataLoader(
                self._fetch,
                batch_sampler=self._pieces,  # type: ignore[arg-type]
                collate_fn=_unchanged,
                num_workers=workers,
                pin_memory=pins,
                persistent_workers=loading.persistent_workers and workers > 0,
                generator=torch.Generator(),  # its base seed must not come from the model's generator
            )

    def largest(self, window: Window) -> int:
        """Return the most samples of a micro-batch in `window`."""
        return min(self._cut[0], window.samples or 0)

    def cut(self, N: int, plan: Plan | None = None) -> None:
        """Make micro-batches of N from the next call of `windows` on, in the windows of `plan` if it is given."""
        self._cut = N, *self._cut[1:]
        self._plan = plan or self._plan

    def windows(self, epoch: int, update: int, samples: int, positions: Positions = None) -> Iterator[Window]:
        """Yield the windows of `epoch` from process 0's position on. Raises UserError for an order of other length."""
        order = check_order(self._order(epoch))
        if len(order) != self._plan.samples:
            raise UserError(
                f"the order of epoch {epoch} has {len(order)} samples, that of epoch 0 {self._plan.samples}: "
                "an order must have the same length in all epochs."
            )
        # the first sample of each micro-batch, counted in samples: a group holds several
        before = samples_before(order)
        offset = positions[0][1] if positions and positions[0][0] == epoch else 0
        windows, ahead = tee(self._plan.windows(epoch, update, offset))
        planned, pieces = tee(piece for window in ahead for piece in window.micro_batches(*self._cut))
        self._pieces.current = self._fetches(epoch, pieces, order, before)
        with shielded():
            loader: Any = map(self._fetch.__getitems__, self._pieces) if self._loader is None else self._loader
            batches = iter(loader)
        if self._prefetch is not None:
            batches = self._prefetch.one_ahead(batches)
        N, rank, P, spread = self._cut
        for window in windows:
            samples, count = before[window.stop] - before[window.start], window.count(N, P, spread)
            is_empty, has_more = count <= rank, window.stop < self._plan.samples
            micros = iter(()) if is_empty else self._micros(batches, planned, before)
            yield Window(window.stage, -(-count // P), is_empty, (epoch, window.stop), samples, has_more, micros)

    def _fetches(
        self, epoch: int, pieces: Iterable[PlannedMicroBatch], order: Sequence[Any], before: Sequence[int]
    ) -> Iterator[Piece]:
        if isinstance(order, KeyedPermutation):
            yield from ((epoch, start, indices) for start, indices in order.read(pieces))
            return
        is_grouped = not isinstance(before, range)
        for start, stop, _ in pieces:
            chosen: Any = order[start:stop]
            if is_grouped:
                chosen = list(chain.from_iterable(chosen))
            indices = chosen.tolist() if hasattr(chosen, "tolist") else list(chosen)
            yield epoch, before[start], indices

    def _micros(
        self, batches: Iterator[Any], planned: Iterator[PlannedMicroBatch], before: Sequence[int]
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one window, up to its last one of `planned`."""
        to_device, batching = self._to_device, self._batching
        for start, stop, is_last in planned:
            batch, size, problem = next(batches), before[stop] - before[start], ""
            if batching is not None:
                problem = size_problem(batching, batch, size)
                size = size if problem else self._batch_size(batch)
            yield MicroBatch(to_device(batch), size, before[start], is_last, problem)
            if is_last:
                return


def samples_before(order: Sequence[Any]) -> Sequence[int]:
    """Return the samples before each position of an order: the position itself, unless the order holds groups."""
    if len(order) and isinstance(order[0], Sequence):
        return list(accumulate(map(len, order), initial=0))
    return range(len(order) + 1)


class _PieceSampler:
    """The DataLoader's batch sampler; each epoch sets its pieces."""

    current: Iterator[Piece] = iter(())

    def __iter__(self) -> Iterator[Piece]:
        return self.current


def _unchanged(batch: Any) -> Any:
    return batch
