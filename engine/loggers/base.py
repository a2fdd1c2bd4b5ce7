"""Loggers: their interface, and the guard that lets none of them end a run."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

log = logging.getLogger("tally")


class Logger(Protocol):
    """Anything that takes records, on process 0. If it has `open(start: Start)`, that is called first."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one update's record, or one of validation means (`validation/...` beside `update` and `epoch`)."""
        ...

    def close(self) -> None:
        """Flush; the run is over."""
        ...


class Start(NamedTuple):
    """The start or resume of a run: the records of later updates and validations come again."""

    folder: Path | None
    """The `run_dir`."""
    update: int
    validated_update: int
    """The update of the last validation that counts."""
    record: Mapping[str, Any]
    """That of the last update; empty at the start."""
    weight: float
    """The weight of all updates so far: samples, or valid tokens."""
    configuration: Mapping[str, Any]
    pinned: Path | None = None
    """The `run_dir` by a path that follows it if it is moved: for files that are opened again while the run lives."""
    run: str | None = None
    """An id of the run in the `run_dir`, the same after each resume."""


def opened(loggers: Iterable[Logger], start: Start) -> list[Logger]:
    """Open loggers and return those that could be, guarded: none of their failures ends the run."""
    guarded = [_Guarded(logger) for logger in loggers]
    return [logger for logger in guarded if logger.open(start)]


class _Guarded:
    """A logger whose first failure is logged as a warning; it still gets later records."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._has_failed = False

    def open(self, start: Start) -> bool:
        opens = getattr(self._logger, "open", None)
        return opens is None or self._try(opens, start)

    def log(self, record: Mapping[str, Any]) -> None:
        self._try(self._logger.log, record)

    def close(self) -> None:
        self._try(self._logger.close)

    def _try(self, method: Callable[..., object], *arguments: Any) -> bool:
        try:
            method(*arguments)
        except Exception as error:  # a service that is away, a full disk: whatever it is, the run matters more
            if not self._has_failed:
                what = f"{type(self._logger).__name__} failed in {method.__name__}(): {type(error).__name__}: {error}."
                log.warning("%s Training continues; metrics.jsonl in the run_dir has every update.", what)
            self._has_failed = True
            return False
        return True
