"""The windows of a run: which samples each update sees, on which process, as arithmetic on one sample offset.

An update takes the next `effective_batch` positions of the epoch's order, or what is left. They are cut into pieces of
N from the update's first sample, and piece j goes to process j mod P. So the micro-batches do not depend on P.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from engine.errors import UserError
from engine.plan.schedule import Schedule, Stage

PlannedMicroBatch = tuple[int, int, bool]
"""The samples [start, stop) of an epoch's order, and whether it is its process's last of a window."""


@dataclass(slots=True)
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

    def micro_batches(self, N: int, rank: int = 0, P: int = 1, spread: bool = False) -> Iterator[PlannedMicroBatch]:
        """Yield each micro-batch of process `rank` among P, if it has any.

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


ENDLESS = 1 << 62  # more epochs, updates or samples than any run has


class Stretch(NamedTuple):
    """Windows of one stage in a row: the same ones, from `start` to `stop`, in each of `epochs` epochs."""

    epoch: int  # its first
    update: int  # the updates before it
    start: int
    stop: int
    windows: int  # in each epoch
    epochs: int
    stage: Stage

    @property
    def updates(self) -> int:
        """All of its windows."""
        return self.windows * self.epochs

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield the number of full windows and their samples, and the same of the last windows of the epochs."""
        B, epochs = self.stage.effective_batch, self.epochs
        if self.windows > 1:
            yield (self.windows - 1) * epochs, B
        yield epochs, self.stop - self.start - (self.windows - 1) * B


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

    def stretches(self, epoch: int = 0, update: int = 0) -> Iterator[Stretch]:
        """Yield the run from the start of `epoch` on, in closed form. A stage has three at most."""
        samples, unit, stages, offset = self.samples, self.schedule.unit, self.schedule.stages, 0
        last_epoch, last_update = self.max_epochs or ENDLESS, self.max_updates or ENDLESS
        ends, at = [*self.schedule.firsts[1:], ENDLESS], self.schedule.index(epoch, update, epoch * samples)
        while epoch < last_epoch and update < last_update:
            place = epoch if unit == "epoch" else update if unit == "update" else epoch * samples + offset
            while ends[at] <= place:
                at += 1
            left, B, epochs = ends[at] - place, stages[at].effective_batch, 0
            windows = -(-(samples - offset) // B)
            if offset == 0:  # the whole epochs in which no window starts in another stage
                by_sample = -(-(left - (windows - 1) * B) // samples)
                whole = left if unit == "epoch" else left // windows if unit == "update" else by_sample
                epochs = min(whole, last_epoch - epoch, (last_update - update) // windows)
            if epochs < 1:  # a part of one
                in_stage = windows if unit == "epoch" else left if unit == "update" else -(-left // B)
                epochs, windows = 1, min(windows, in_stage, last_update - update)
            stop = min(offset + windows * B, samples)
            yield Stretch(epoch, update, offset, stop, windows, epochs, stages[at])
            update += windows * epochs
            epoch, offset = (epoch + epochs, 0) if stop == samples else (epoch, stop)

    def updates_in_epoch(self, epoch: int, update: int = 0) -> int:
        """Return the number of updates in `epoch` when `update` came before it, in closed form for each stage."""
        return sum(s.updates for s in replace(self, max_epochs=epoch + 1).stretches(epoch, update))

    @cached_property
    def updates(self) -> int:
        """The exact number of updates in the whole run. Raises UserError if it has no end."""
        if self.max_epochs is None:
            if self.max_updates is None:
                raise UserError("max_epochs=None, max_updates=None: expected an end. Give one, such as max_epochs=10.")
            return self.max_updates
        return sum(stretch.updates for stretch in self.stretches())
