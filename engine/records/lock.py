"""The lock of a run's folder: one run at a time, in this process and in others."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import MutableMapping
from io import FileIO
from pathlib import Path
from weakref import WeakValueDictionary

from engine.errors import RunDirTakenError

# The locks of this process, by process, device and inode: `lockf` lets one process lock a file twice
_held: MutableMapping[tuple[int, int, int], FileIO] = WeakValueDictionary()
_trying = threading.Lock()


def locked(path: Path, seconds: float = 5.0) -> FileIO:
    """Lock a file until it is closed. Raises RunDirTakenError if it stays locked; a file system may have no locks."""
    end = time.monotonic() + seconds
    while (file := _try(path)) is None:
        if time.monotonic() > end:
            raise RunDirTakenError(f"run_dir={str(path.parent)!r}: another run is writing it. Wait, or use a new one.")
        time.sleep(0.1)
    return file


def _try(path: Path) -> FileIO | None:
    with _trying:
        holder = _held.get(_key(path.stat())) if path.exists() else None
        if holder is not None and not holder.closed:
            return None  # opening and closing the file here would release the lock
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC), "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
        _held[_key(os.fstat(file.fileno()))] = file
        return file


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino
