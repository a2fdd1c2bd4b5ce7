"""Loggers by name."""

from collections.abc import Callable, Sequence
from functools import partial

from engine.errors import UserError
from engine.loggers.base import Logger
from engine.loggers.csv_tables import CSVLogger
from engine.loggers.tensorboard_events import TensorBoardLogger
from engine.loggers.tracker import TrackerLogger

BY_NAME: dict[str, Callable[[], Logger]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
BY_NAME["wandb"] = partial(TrackerLogger, "wandb")


def make_loggers(given: Logger | str | Sequence[Logger | str] | None, run_dir: str | None) -> list[Logger]:
    """Return the loggers that are given by name or as objects. Raises UserError for anything else."""
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    loggers: list[Logger] = []
    for one in (one for one in listed if one is not None):
        logger = BY_NAME[one]() if isinstance(one, str) and one in BY_NAME else one
        if isinstance(logger, str) or not all(callable(getattr(logger, name, None)) for name in ("log", "close")):
            raise UserError(f"loggers={one!r}: give {', '.join(BY_NAME)}, or an object with log(record) and close().")
        if run_dir is None and getattr(logger, "needs_run_dir", False):
            raise UserError(f"loggers={one!r} writes into the run's folder: give a run_dir.")
        loggers.append(logger)
    return loggers
