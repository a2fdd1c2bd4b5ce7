"""Signals from outside: stop at the next boundary and save (SIGTERM, SIGINT), or save and go on (SIGUSR1)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 75
"""Of a run that was interrupted and saved itself: start it again to go on (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ends a window between two micro-batches, because a signal has asked for it."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def shielded() -> Iterator[None]:
    """Let processes and threads that start here never see our signals: a DataLoader's workers end when it does.

    torchrun sends SIGTERM to all of them, and a worker that dies of it takes the run with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupts:
    """Notes signals while it is entered, in the main thread; elsewhere it notes none. A second SIGINT raises at once.

    The flags are this process's own wishes: what is done about them, all processes agree on first.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether this process has been asked to stop. Never taken back."""
        self.wants_save = False
        """Whether this process has been asked to save."""
        self.reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
                    handler = self._save if number == signal.SIGUSR1 else self._stop
                    self._before[number] = signal.signal(number, handler) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.requested, self.reason = True, signal.Signals(number).name

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.wants_save = True
