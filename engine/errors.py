"""Errors that end a run; each message says what happened, on which process, and the way out."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from strategies.errors import UserError as UserError
from strategies.errors import check_count as check_count


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names it and the reason."""


class RunDirTakenError(UserError, FileExistsError):
    """A `run_dir` that holds something else, or that another process is writing."""


class StorageError(OSError):
    """The run's own files could not be written: a full or missing disk. The message names them and the reason."""


class RunDirLostError(StorageError):
    """A `run_dir` that was moved, deleted or replaced while the run was writing it."""


class ProcessFailureError(RuntimeError):
    """Another process failed; the message names it and gives its error."""


class ReplicaError(RuntimeError):
    """Processes that should hold the same gradient or parameters do not; the message names them and their values."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite; the message names the last good checkpoint."""


STATUSES: dict[type[Exception], int] = {UserError: 2, NonFiniteError: 70, StorageError: 74, ProcessFailureError: 76}
"""Exit statuses, those of sysexits.h, of errors whose message says everything: they need no traceback."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Raise StorageError, naming `what`, for an OSError or what safetensors raises for one."""
    try:
        yield
    except (OSError, getattr(sys.modules.get("safetensors"), "SafetensorError", OSError)) as error:  # once imported
        if isinstance(error, (StorageError, UserError)):
            raise
        raise StorageError(
            f"{what} could not be written: {error}. Mend or free the disk, then start the same command again."
        ) from error


def describe(error: BaseException) -> str:
    """Return the class and the text of `error` as UTF-8 can hold it; some errors cannot even tell their text."""
    try:
        text = str(error)
    except Exception as another:
        text = f"its text raises {type(another).__name__}"
    return f"{type(error).__name__}: {text}".encode(errors="backslashreplace").decode()


def listed(lines: Sequence[str], most: int = 8) -> str:
    """Return lines for the end of a message, each on a new line: at most `most`, the last of which counts the rest."""
    more = [f"and {len(lines) - most + 1} more"] if len(lines) > most else []
    return "".join(f"\n    {line}" for line in [*lines[: most - len(more)], *more])
