"""Signals: stop at the next boundary with a checkpoint (SIGTERM, SIGINT, SIGHUP), or save and continue (SIGUSR1)."""

import atexit
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self
from weakref import WeakSet

EXIT_STATUS = 75
"""Exit status of a run that was interrupted and saved itself: start it again to resume (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ends a window between two micro-batches after a signal."""


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (*STOPPING, signal.SIGUSR1)


@contextmanager
def shielded() -> Iterator[None]:
    """Block our signals in processes and threads that start here: torchrun's SIGTERM would end a loader's worker."""
    _end_children_at_exit()
    children = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _workers.update(set(multiprocessing.active_children()) - children)
        atexit.unregister(_end_children)
        atexit.register(_end_children)  # before the handler of a DataLoader that pins memory, which waits for each


_at_exit: Any = None
_workers: WeakSet[Any] = WeakSet()  # the processes that were started while signals were shielded


def _end_children_at_exit() -> None:
    """At its exit Python sends SIGTERM to daemonic children and joins them without a limit: end them before."""
    global _at_exit
    if _at_exit is None or not _at_exit.still_active():  # a forked process starts with none
        _at_exit = multiprocessing.util.Finalize(None, _end_children, exitpriority=100)


def _end_children(seconds: float = 1.0) -> None:
    """End the workers that are shielded: by SIGKILL, if SIGTERM does not reach them. Other children are the user's."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each worker
    children = [child for child in multiprocessing.active_children() if child in _workers]
    for child in children:
        child.terminate()
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        child.kill()


class Command:
    """The signals of a whole command, which ends with the status of its run whenever they come.

    From `begin` until a run heeds them, one that stops a run ends the process with EXIT_STATUS, since nothing can be
    lost yet. After that run they are only noted; after `end`, ignored.
    """

    def __init__(self) -> None:
        self.stop_requested = False  # by a signal that stops a run
        self.is_active = False
        self._pipe: tuple[int, int] | None = None

    def begin(self) -> None:
        """Take the signals over, in the main thread. A new thread ends the process: the main one may be in C++."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.is_active, self.stop_requested = True, False
        self._pipe = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _heeded():
            signal.signal(number, self.note)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_exit_when_told, args=(reader,), name="tally-signals", daemon=True).start()

    def hand_over(self) -> None:
        """Only note signals from now on: a run begins."""
        self._stop_watching()
        if self.is_active:
            leave_status(None)

    def let_go(self) -> None:
        """Let signals end the process: a run without a folder saves nothing."""
        if self.is_active:
            self.hand_over()
            for number in STOPPING:
                if signal.getsignal(number) == self.note:
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _stop_watching(self) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
            self._pipe = None

    def end(self) -> None:
        """Ignore signals from now on: Python gives handlers up some time before the process ends."""
        if self.is_active:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self._stop_watching()
            self.is_active = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.stop_requested |= number != signal.SIGUSR1


COMMAND = Command()  # that of this process; in a program of somebody else's it never begins


def _exit_when_told(reader: int) -> None:
    while number := os.read(reader, 1):
        if number[0] in STOPPING:
            leave_status(EXIT_STATUS)
            os._exit(EXIT_STATUS)
    os.close(reader)


def leave_status(status: int | None) -> None:
    """Leave the command's status for launch/start.py, unless another process has; None: it is not known any more."""
    if path := os.environ.get("TALLY_STATUS"):
        with suppress(OSError):
            if status is not None:
                Path(path).write_text(str(status))
            elif not Path(path).read_text():
                Path(path).unlink()


def _heeded() -> list[signal.Signals]:
    """Our signals, less those that a job in the background ignores. SIGUSR1 is ignored by launch/start.py alone."""
    return [n for n in SIGNALS if n == signal.SIGUSR1 or signal.getsignal(n) is not signal.SIG_IGN]


class Signals:
    """Notes signals, as requests of this process, while entered in the main thread. A second SIGINT raises at once."""

    def __init__(self) -> None:
        self.stop_requested = False  # never cleared
        self.save_requested = False
        self.name = ""  # that of the signal that asked this process to stop
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            COMMAND.hand_over()
            for number in _heeded():
                handler = self._save if number == signal.SIGUSR1 else self._stop
                self._handlers_before[number] = signal.signal(number, handler) or signal.SIG_DFL
            if COMMAND.is_active and COMMAND.stop_requested:  # between the two
                self.stop_requested, self.name = True, signal.SIGTERM.name
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        COMMAND.note(number, frame)
        self.stop_requested, self.name = True, signal.Signals(number).name

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True


_fork = threading.local()


def _before_fork() -> None:
    """Hold our signals back: Python forgets one that reaches a forked process before its own code runs."""
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _restore_in_child() -> None:
    """Give a forked process Python's own handlers: ours would only note the signal that is to end it."""
    for number in SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), Signals | Command):
            default: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else default)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_restore_in_child)
