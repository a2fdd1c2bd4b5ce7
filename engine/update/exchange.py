"""The exchange of an update: its message, and what processes do for one another when one of them fails."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from engine.data.window import Window
from engine.errors import ProcessFailureError, ReplicaError, UserError, describe
from engine.loggers.grouped import GROUPED
from engine.memory import is_out_of_memory, release
from engine.signals import Interrupted, Signals
from engine.update.loss_sum import LossSum
from engine.update.means import MeanSums, Pair
from engine.update.message import (
    CAUSES,
    HEADER,
    Agreed,
    Message,
    Requests,
    Slowest,
    agree,
    check_norms,
    differ,
    slowest,
    slowness,
    total,
)
from strategies import MESSAGE_MAXIMA, PendingRows, Strategy

ACTIVITY_TOPIC = "activity"
RESERVED = {"update", *GROUPED, *GROUPED.values(), "data/weight", "speed/weight_per_second"}
"""Names that every record has, and those of their columns in tables."""
NO_REDO = (
    "Use smaller micro-batches. Trainer makes them by itself with one device, DP or DDP, without SyncBatchNorm, for "
    "data that can be read again."
)


class Exchange:
    """Sends this process's message while the last backward runs, and receives those of all.

    A process that is interrupted or fails still sends its message and takes part in the reduction with weight 0: the
    others learn of it instead of waiting.
    """

    def __init__(self, strategy: Strategy, signals: Signals) -> None:
        self._strategy, self._signals = strategy, signals
        self.is_alone = strategy.processes == 1
        self.means = MeanSums(strategy.device)
        """The values logged in the current window."""
        self.names: list[str] = []
        """The names that the processes have agreed on: each message has their sums and weights."""
        self.metrics: dict[str, float] = {}
        """The means of the window, over all processes, once it is received."""
        self.agree_on(())
        self.grad_norm = math.nan
        """The gradient norm of the last update: replicas compare it in the next message."""
        self.sends_at_start = True
        """Whether a process without a micro-batch sends its message at the window's start."""
        self._counted: dict[str, float] = {}
        """The weights of terms in the current window, over all processes."""
        self.can_redo = False
        """Whether a window that ran out of memory can run again; otherwise that ends the run."""
        self.out_of_memory = ""
        """The error by which memory ran out on this process in the current window; "" if it did not."""
        self.is_late = False
        """Whether memory ran out when the message had left, so that the others do not know of it."""
        self._rows: list[list[float]] = []
        self._pairs: dict[str, Pair] = {}
        self._sums: dict[str, Pair] = {}
        self._pending: PendingRows | None = None
        self._seconds = 0.0

    def begin(self, window: Window, losses: LossSum, requests: Requests) -> None:
        """Begin a window; a process without a micro-batch sends its message at once."""
        self._window, self._losses, self._requests = window, losses, requests
        self.out_of_memory, self.is_late = "", False
        self.means.by_name, self._pairs, self.metrics = {}, {}, {}
        self._sums, self._counted = {}, {}
        if self.is_alone:
            return
        self._pending, self._began = None, time.perf_counter()
        if window.is_empty and self.sends_at_start:
            self.send()

    def send(self) -> None:
        """Send the message of this window."""
        if not self.is_alone:
            self._pending = self._strategy.exchange(self._message())

    def count(self, weights: Mapping[str, float], micro_batches: int, update: int) -> dict[str, float]:
        """Return the sums of all processes' `weights` of terms, before a window's first forward; its losses must agree.

        Raises as `receive`, Interrupted after a signal, and UserError if names differ between processes.
        """
        self.means.by_name = {name: (1.0, weight) for name, weight in weights.items()}  # what is logged has (0, 0) here
        self._losses.micro_batches = micro_batches
        self.send()
        agreed = self.receive(update, is_start=True)
        self._counted = {name: weight for name, (terms, weight) in self._sums.items() if terms}
        self.means.by_name, self._pairs, self.metrics, self._losses.micro_batches = {}, {}, {}, 0
        self._pending, self._began = None, time.perf_counter()
        if agreed.abort:
            raise Interrupted
        return self._counted

    def receive(self, update: int, is_start: bool = False) -> Agreed:
        """Wait for all messages and return their sums; `is_start` says that the reduction is still to come.

        Raises ProcessFailureError if a process has failed, ReplicaError if gradient norms differ.
        """
        if self.is_alone and self.out_of_memory:
            return agree([Message(out_of_memory=1.0)])
        if self.is_alone:
            weight, loss = self._losses.read()
            requests, aborts = self._requests, self._signals.stop_requested
            if self.means.by_name:
                self._pairs = self.means.read()
                rows = [] if self._pairs.keys() - {*self.names} else [_flat(self.names, self._pairs)]
                self._add_up(rows, update, is_start)
            samples, has_more = self._losses.samples, self._window.has_more
            return Agreed(weight, loss, samples, has_more, requests.stop, requests.save, aborts)
        if self._pending is None:  # another process computes the losses
            self.send()
        assert self._pending is not None
        self._rows = self._pending()
        agreed = agree(self._rows)
        if agreed.failed:
            if is_start:
                self._strategy.join(self._window)
            texts = enumerate(self._strategy.gather(None))
            failures = (f"process {rank} failed in update {update}: {text}" for rank, text in texts if text)
            raise ProcessFailureError("; ".join(failures))
        if differ([*(row[-2] for row in self._rows), -self._rows[0][-1]]):  # of the one row of sums: most and least
            check_norms(self._strategy.gather(self.grad_norm), update)
        if (self.names or agreed.has_new_names) and not (agreed.abort or agreed.out_of_memory):
            rows = [] if agreed.has_new_names else [row[HEADER:-MESSAGE_MAXIMA] for row in self._rows]
            self._add_up(rows, update, is_start)
        return agreed

    def agree_on(self, names: Iterable[str]) -> None:
        """From now on let each message have the sums of `names`, the same on all processes."""
        self.names = [*names]
        self._strategy.message_length = HEADER + 2 * len(self.names) + MESSAGE_MAXIMA

    def _add_up(self, rows: list[list[float]], update: int, is_start: bool) -> None:
        """Make the means of all processes' sums; without `rows`, agree on the names first, in a slow exchange."""
        if not rows:
            everyone = self._strategy.gather((self._losses.micro_batches, self._pairs))
            names = dict.fromkeys([*self.names, *(name for _, pairs in everyone for name in pairs)])
            given = [[*pairs] for micro_batches, pairs in everyone if micro_batches and (is_start or not update)]
            _check_names(names, given, "terms with" if is_start else "logged")
            self.agree_on(names)
            rows = [_flat(names, pairs) for _, pairs in everyone]
        sums = [total(column) for column in zip(*rows, strict=True)]
        self._sums = dict(zip(self.names, zip(sums[::2], sums[1::2], strict=True), strict=True))
        self.metrics = {name: s / w for name, (s, w) in self._sums.items() if w}
        for name, counted in self._counted.items():
            if not math.isclose(found := self._sums[name][1], counted, rel_tol=1e-6):
                what = f"term {name!r}: weights() counted {counted} in update {update}, but its losses have weight"
                raise UserError(f"{what} {found}. Count the same in both.")

    @property
    def slowest(self) -> Slowest | None:
        """The process that all others wait for; None before the first message, and for a single process."""
        if not self._rows:
            return None
        seconds = total([row[HEADER - 1] for row in self._rows])
        return slowest(max(row[-MESSAGE_MAXIMA] for row in self._rows), seconds, self._strategy.processes)

    def check_replicas(self, update: int) -> None:
        """Compare the parameters of all processes, to the bit. Raises ReplicaError on all of them.

        It reads every parameter, so it is for ends of epochs and for saves. Reduced gradients, which each message
        compares, are equal even if parameters are not.
        """
        if self.is_alone:
            return
        rows = self._strategy.compare((self.grad_norm, self._strategy.fingerprint()))
        check_norms([norm for norm, _ in rows], update)
        if len({fingerprint for _, fingerprint in rows}) > 1:
            listed = ", ".join(f"{value} on process {rank}" for rank, (_, value) in enumerate(rows))
            raise ReplicaError(
                f"the processes' models have diverged: after update {update} their parameters' bits sum to {listed}. "
                f"{CAUSES}"
            )

    def stop(self, error: Exception) -> None:
        """Finish with weight 0 a window that `error` has ended on this process; raise it if the run ends with it.

        After this process's message the last backward failed. If memory ran out, the others may learn of it by a
        gradient that is not finite; otherwise they lose contact.
        """
        if isinstance(error, Interrupted):
            self.send()
            self._strategy.join(self._window)
            return
        is_late = self._pending is not None
        if self.can_redo and is_out_of_memory(error):
            self.out_of_memory = describe(error)
            release(self._strategy.device, error)
            if not (self.is_alone or is_late):
                self._send_without_data(out_of_memory=1.0)
            self.is_late = is_late and self._strategy.finish_reduction()
            if self.is_late == is_late:
                return
        elif is_out_of_memory(error):
            error.add_note(NO_REDO)
        if not (self.is_alone or is_late or self._strategy.has_lost_contact(error)):
            self._send_without_data(failed=1.0)
            self._strategy.gather(describe(error))
        raise error

    def fail(self, error: Exception, update: int) -> NoReturn:
        """Let the other processes know of `error` and raise it, or ProcessFailureError if another one is gone."""
        strategy = self._strategy
        if strategy.has_lost_contact(error):
            raise lost_contact(strategy, f"in update {update}", error) from error
        if not isinstance(error, ProcessFailureError):
            strategy.report(describe(error))
            self.stop(error)
        raise error

    def _send_without_data(self, **told: float) -> None:
        """Send a message of weight 0, and take part in the window."""
        self._pending = self._strategy.exchange(self._numbers(Message(local_seconds=self._seconds, **told)))
        self._strategy.join(self._window)

    def _message(self) -> Sequence[float]:
        """Read the sums on the device: the one host-device sync of a window."""
        weight, loss = self._losses.read()
        if self.means.by_name:
            self._pairs = self.means.read()
        seconds = time.perf_counter() - self._began
        self._seconds += (seconds - self._seconds) * (0.1 if self._seconds else 1.0)
        requests, stop_requested, has_more = self._requests, self._signals.stop_requested, self._window.has_more
        counts, wishes = (weight, loss, self._losses.samples, has_more), (requests.stop, requests.save, stop_requested)
        has_new_names = bool(self._pairs) and not self._pairs.keys() <= {*self.names}
        return self._numbers(Message(*counts, *wishes, 0.0, has_new_names, 0.0, self._seconds))

    def _numbers(self, message: Message) -> list[float]:
        sums = _flat(self.names, self._pairs) if self.names else ()
        slow = slowness(self._seconds, self._strategy.rank)
        return [*message, *sums, slow, self.grad_norm, -self.grad_norm]


def _flat(names: Iterable[str], pairs: Mapping[str, Pair]) -> list[float]:
    return [number for name in names for number in pairs.get(name, (0.0, 0.0))]


def _check_names(names: Iterable[str], everyone: list[list[str]], have: str) -> None:
    """Raise UserError for names that records have already, and if `everyone` has given other names than the first."""
    reserved = RESERVED | {f"train/{name}" for name in names}  # the column of what is logged as `name`
    if taken := [name for name in names if name in reserved or name.startswith(("validation/", "lr/"))]:
        what = f"self.log({taken[0]!r}, ...)" if have == "logged" else f"term {taken[0]!r}"
        raise UserError(f"{what}: records, or tables made of them, have a field of that name. Use another name.")
    if any({*logged} != {*everyone[0]} for logged in everyone):
        listed = "; ".join(", ".join(map(repr, logged)) or "nothing" for logged in everyone)
        raise UserError(
            f"the processes have {have} different names in their first window: {listed}. Give the same on all, with "
            "weight=0 if nothing is to be counted."
        )


def lost_contact(strategy: Strategy, where: str, error: BaseException) -> ProcessFailureError:
    """Return the error of a process that waits in vain for another: who failed, or what each was doing last."""
    reports = [strategy.reported()]
    if not reports[0]:
        for rank, text in strategy.posted(ACTIVITY_TOPIC).items():
            at, _, activity = text.partition(" ")
            if rank != strategy.rank:
                reports.append(f"process {rank} last reported {time.time() - float(at):.0f} s ago: {activity}")
    known = "; ".join(filter(None, reports))
    return ProcessFailureError(f"lost contact with another process {where}. {known} ({error})".strip())
