"""Signals: stop at the next boundary with a checkpoint (SIGTERM, SIGINT), or save one and continue (SIGUSR1)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 75
"""Exit status of a run that was interrupted and saved itself: start it again to resume (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ends a window between two micro-batches after a signal."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def shielded() -> Iterator[None]:
    """Block our signals in processes and threads that start here; a DataLoader's workers end with the loader.

    torchrun sends SIGTERM to all of them, and a worker that dies of it ends the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Signals:
    """Notes signals while it is entered, in the main thread only. A second SIGINT raises KeyboardInterrupt at once.

    The flags are requests of this process; all processes agree on them before anything is done.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        """Whether a signal has asked this process to stop. Never cleared."""
        self.save_requested = False
        """Whether a signal has asked this process to save."""
        self.name = ""
        """The signal that asked it to stop."""
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
                    handler = self._save if number == signal.SIGUSR1 else self._stop
                    self._handlers_before[number] = signal.signal(number, handler) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.stop_requested, self.name = True, signal.Signals(number).name

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True
