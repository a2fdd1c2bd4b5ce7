"""The exchange of an update: its message, and what processes do for one another when one of them fails."""

from __future__ import annotations

import math
import time

from engine.data.window import Window
from engine.errors import ProcessFailureError, ReplicaError, describe
from engine.signals import Interrupted, Signals
from engine.update.loss_sum import LossSum
from engine.update.message import CAUSES, Agreed, Message, Requests, agree, check_norms
from strategies import PendingRows, Strategy

ACTIVITY_TOPIC, FAILURE_TOPIC = "activity", "failure"


class Exchange:
    """Sends this process's message while the last backward runs, and receives those of all.

    A process that is interrupted or fails still sends its message and takes part in the reduction with weight 0: the
    others learn of it instead of waiting.
    """

    def __init__(self, strategy: Strategy, signals: Signals) -> None:
        self._strategy, self._signals = strategy, signals
        self.is_alone = strategy.processes == 1
        strategy.message_length = len(Message._fields)
        self.grad_norm = math.nan
        """The gradient norm of the last update: replicas compare it in the next message."""
        self.is_late = False
        """Whether a process without a micro-batch sends its message later than at the window's start."""
        self._rows: list[list[float]] = []
        self._pending: PendingRows | None = None
        self._seconds = 0.0

    def begin(self, window: Window, losses: LossSum, requests: Requests) -> None:
        """Begin a window; a process without a micro-batch sends its message at once."""
        self._window, self._losses, self._requests = window, losses, requests
        if self.is_alone:
            return
        self._pending, self._began = None, time.perf_counter()
        if window.is_empty and not self.is_late:
            self.send()

    def send(self) -> None:
        """Send the message of this window."""
        if not self.is_alone:
            self._pending = self._strategy.exchange(self._message())

    def receive(self, update: int) -> Agreed:
        """Wait for all messages and return their sums.

        Raises ProcessFailureError if a process has failed, ReplicaError if gradient norms differ.
        """
        if self.is_alone:
            weight, loss = self._losses.read()
            requests, aborts = self._requests, self._signals.stop_requested
            samples, has_more = self._losses.samples, self._window.has_more
            return Agreed(weight, loss, samples, has_more, requests.stop, requests.save, aborts)
        if self._pending is None:  # another process computes the losses
            self.send()
        assert self._pending is not None
        self._rows = self._pending()
        agreed = agree(self._rows)
        if agreed.failed:
            failures = [(rank, text) for rank, text in enumerate(self._strategy.gather(None)) if text]
            raise ProcessFailureError(
                "; ".join(f"process {rank} failed in update {update}: {text}" for rank, text in failures)
            )
        check_norms([row[-1] for row in self._rows], update)
        return agreed

    @property
    def local_seconds(self) -> list[float]:
        """Seconds that each process has spent by itself in windows so far, by rank; empty for a single process."""
        return [Message(*row).local_seconds for row in self._rows]

    def check_replicas(self, update: int) -> None:
        """Compare the parameters of all processes, to the bit. Raises ReplicaError on all of them.

        It reads every parameter, so it is for ends of epochs and for saves. Reduced gradients, which each message
        compares, are equal even if parameters are not.
        """
        if self.is_alone:
            return
        check_norms(self._strategy.gather(self.grad_norm), update)
        if len(set(fingerprints := self._strategy.gather(self._strategy.fingerprint()))) > 1:
            listed = ", ".join(f"{value} on process {rank}" for rank, value in enumerate(fingerprints))
            raise ReplicaError(
                f"the processes' models have diverged: after update {update} their parameters' bits sum to {listed}. "
                f"{CAUSES}"
            )

    def stop(self, error: Exception) -> None:
        """Finish with weight 0 a window that `error` has ended on this process; raise it unless it is a signal's.

        After this process's message it is too late: the last backward failed, and the others lose contact.
        """
        if isinstance(error, Interrupted):
            self.send()
            self._strategy.join(self._window)
            return
        if not (self.is_alone or self._pending is not None or self._strategy.has_lost_contact(error)):
            message = Message(failed=1.0, local_seconds=self._seconds, grad_norm_before=self.grad_norm)
            self._pending = self._strategy.exchange(message)
            self._strategy.join(self._window)
            self._strategy.gather(describe(error))
        raise error

    def _message(self) -> Message:
        """Read the sums on the device: the one host-device sync of a window."""
        weight, loss = self._losses.read()
        self._seconds += time.perf_counter() - self._began
        requests, stop_requested = self._requests, self._signals.stop_requested
        return Message(
            weight,
            loss,
            self._losses.samples,
            self._window.has_more,
            requests.stop,
            requests.save,
            stop_requested,
            0.0,
            self._seconds,
            self.grad_norm,
        )


def lost_contact(strategy: Strategy, where: str, error: BaseException) -> ProcessFailureError:
    """Return the error of a process that waits in vain for another: who failed, or what each was doing last."""
    reports = [f"process {rank} failed: {text}" for rank, text in strategy.posted(FAILURE_TOPIC).items()]
    if not reports:
        for rank, text in strategy.posted(ACTIVITY_TOPIC).items():
            at, _, activity = text.partition(" ")
            if rank != strategy.rank:
                reports.append(f"process {rank} last reported {time.time() - float(at):.0f} s ago: {activity}")
    return ProcessFailureError(f"lost contact with another process {where}. {'; '.join(reports)} ({error})".strip())
