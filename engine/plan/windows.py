"""The windows of a run: which samples each update sees, on which process, as arithmetic on one sample offset.

An update takes the next `effective_batch` positions of the epoch's order, or what is left. They are cut into pieces of
N from the update's first sample, and piece j goes to process j mod P. So the micro-batches do not depend on P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import UserError
from engine.plan.schedule import Schedule, Stage


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """The samples [start, stop) of an epoch's order that one update sees, over all processes."""

    start: int
    stop: int
    stage: Stage

    @property
    def samples(self) -> int:
        """The effective batch of this update."""
        return self.stop - self.start

    def count(self, N: int, P: int = 1, spread: bool = False) -> int:
        """Return the number of micro-batches of all P processes together."""
        pieces = -(-self.samples // N)
        return min(self.samples, -(-pieces // P) * P) if spread else pieces

    def micro_batches(self, N: int, rank: int = 0, P: int = 1, spread: bool = False) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, is_last) for each micro-batch of process `rank` among P, if it has any.

        Each has N samples, the window's last one what is left. `spread` makes equally many on each process, of similar
        size and at most N samples; where a micro-batch begins then depends on P.
        """
        pieces = self.count(N, P, spread)
        for piece in range(rank, pieces, P):
            if spread:
                start, stop = piece * self.samples // pieces, (piece + 1) * self.samples // pieces
            else:
                start, stop = piece * N, min((piece + 1) * N, self.samples)
            yield self.start + start, self.start + stop, piece + P >= pieces


@dataclass(frozen=True)
class Plan:
    """All windows of a run over `samples` samples an epoch; it ends with `max_epochs` or `max_updates`, if given."""

    samples: int
    schedule: Schedule
    max_epochs: int | None = None
    max_updates: int | None = None

    def windows(self, epoch: int, update: int, offset: int = 0) -> Iterator[PlannedWindow]:
        """Yield the windows of `epoch` from sample `offset` on, where `update` updates came before in the run."""
        while offset < self.samples and (self.max_updates is None or update < self.max_updates):
            stage = self.schedule.at(epoch, update, epoch * self.samples + offset)
            stop = min(offset + stage.effective_batch, self.samples)
            yield PlannedWindow(offset, stop, stage)
            offset, update = stop, update + 1

    def all_windows(self) -> Iterator[tuple[int, PlannedWindow]]:
        """Yield (epoch, window) for each update of the run."""
        epoch = update = 0
        while self.max_epochs is None or epoch < self.max_epochs:
            before = update
            for window in self.windows(epoch, update):
                yield epoch, window
                update += 1
            if update == before:
                return
            epoch += 1

    def updates_in_epoch(self, epoch: int, update: int = 0) -> int:
        """Return the number of updates in `epoch` when `update` came before it, in closed form for each stage."""
        offset, count = 0, 0
        while offset < self.samples:
            place = (epoch, update + count, epoch * self.samples + offset)
            stage, left = self.schedule.at(*place), self.schedule.left(*place)
            windows = -(-(self.samples - offset) // stage.effective_batch)
            if left is not None and self.schedule.unit == "update":
                windows = min(windows, left)
            elif left is not None and self.schedule.unit == "sample":
                windows = min(windows, -(-left // stage.effective_batch))
            offset, count = offset + windows * stage.effective_batch, count + windows
        return count if self.max_updates is None else max(0, min(count, self.max_updates - update))

    @property
    def updates(self) -> int:
        """The exact number of updates in the whole run. Raises UserError if it has no end."""
        if self.max_epochs is None:
            if self.max_updates is None:
                raise UserError("max_epochs=None, max_updates=None: expected an end. Give one, such as max_epochs=10.")
            return self.max_updates
        total = 0
        if self.schedule.unit == "epoch":
            for stage in self.schedule.stages:
                left = self.schedule.left(stage.first, 0, 0)
                end = self.max_epochs if left is None else min(stage.first + left, self.max_epochs)
                total += max(0, end - stage.first) * -(-self.samples // stage.effective_batch)
            return total if self.max_updates is None else min(total, self.max_updates)
        for epoch in range(self.max_epochs):
            in_epoch = self.updates_in_epoch(epoch, total)
            total += in_epoch
            if in_epoch == 0:
                break
        return total
