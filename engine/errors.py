"""Errors that end a run; each message says what happened, on which process, and the way out."""

from __future__ import annotations

from strategies.errors import UserError as UserError
from strategies.errors import check_count as check_count


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names it and the reason."""


class RunDirTakenError(UserError, FileExistsError):
    """A `run_dir` that holds something else, or that another process is writing."""


class RunDirLostError(RuntimeError):
    """A `run_dir` that was moved, deleted or replaced while the run was writing it."""


class ProcessFailureError(RuntimeError):
    """Another process failed; the message names it and gives its error."""


class ReplicaError(RuntimeError):
    """Processes that should hold the same gradient or parameters do not; the message names them and their values."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite; the message names the last good checkpoint."""


REPORTED = (UserError, NonFiniteError, ProcessFailureError, RunDirLostError)
"""Errors whose message says everything: the command line prints it without a traceback."""
