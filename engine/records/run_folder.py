"""A run's folder, written by process 0: configuration, one record per update, a summary, the final weights."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import orjson
from torch import Tensor

from engine.errors import RunDirTakenError

log = logging.getLogger("tally")


class RunFolder:
    """The folder of one run: a new one, or with `takes_over` that of the run which is resumed.

    Raises RunDirTakenError if anything else is in it, or if another process is writing it.
    """

    def __init__(self, path: str | Path, takes_over: bool = False) -> None:
        self.path = Path(path)
        is_ours = takes_over and _is_a_run(self.path)
        if self.path.exists() and (not self.path.is_dir() or (not _is_empty(self.path) and not is_ours)):
            way_out = "a new folder" if takes_over else "a new folder, or resume='auto'"
            raise RunDirTakenError(f"run_dir={str(path)!r}: expected a folder that nothing else is in. Use {way_out}.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / LOCK)
        self._metrics: FileIO | None = None
        self._unwritten = b""
        self._is_full = False

    def rewind(self, update: int, validated_update: int) -> int:
        """Cut updates after `update` and validations after `validated_update` from metrics.jsonl: they come again.

        Returns the number of updates that were cut.
        """
        history = self.path / "metrics.jsonl"
        part = history.with_suffix(".part")
        history.touch()
        undone = 0
        with history.open(errors="replace") as lines, part.open("w") as kept:
            for line in lines:
                if _is_before(line, update, validated_update):
                    kept.write(line)
                else:
                    undone += '"loss"' in line and line.endswith("\n")
        part.replace(history)
        return undone

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; if the disk is full, keep it for the next time."""
        try:
            self._unwritten += orjson.dumps(record) + b"\n"  # a number that is not finite becomes null
        except TypeError:
            self._unwritten += _line(record)
        try:
            if self._metrics is None:
                self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)  # a killed run keeps every line
            self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                log.error(
                    "metrics.jsonl could not be written: %s. Training continues and keeps the lines for later.", error
                )
            self._is_full = True

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Append one line to events.jsonl, which no resume cuts."""
        try:
            with (self.path / "events.jsonl").open("ab") as events:
                events.write(_line(event))
        except OSError as error:
            log.error("events.jsonl could not be written: %s. Training continues without the line.", error)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        part = self.path / f"{name}.part"
        part.write_text(json.dumps(_plain(content), indent=2) + "\n")
        part.replace(self.path / name)

    def save_weights(self, state: Mapping[str, Any], name: str = "model.safetensors") -> None:
        """Write a model under the user's own parameter names: tensors, and no extra state."""
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, Tensor)},
            self.path / name,
        )

    def close(self) -> None:
        """Write the lines that are still in memory. Raises OSError if that fails."""
        if self._metrics is not None:
            with self._metrics as metrics:
                metrics.write(self._unwritten)
            self._metrics, self._unwritten = None, b""
        self._lock.close()


MARK = "a run of Tally"
"""The key of config.json that marks a folder as ours."""

LOCK = ".lock"


def _is_empty(path: Path) -> bool:
    return all(entry.name == LOCK for entry in path.iterdir())


def _locked(path: Path, seconds: float = 5.0) -> TextIO:
    """Open and lock a file until it is closed or this process ends. Waits a little for one that is ending."""
    file, end = path.open("w"), time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_held = error.errno in (errno.EACCES, errno.EAGAIN)
            if is_held and time.monotonic() < end:
                time.sleep(0.1)
                continue
            if is_held:
                file.close()
                raise RunDirTakenError(
                    f"run_dir={str(path.parent)!r}: another process is writing it. Wait for it, or use a new folder."
                ) from None
        return file  # where the file system has no locks, nothing is promised


def _is_a_run(path: Path) -> bool:
    if any(path.glob("checkpoints/update-*/manifest.json")):
        return True
    try:
        return MARK in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _is_before(line: str, update: int, validated_update: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith("\n") and bool(record["update"] <= (update if "loss" in record else validated_update))
    except (ValueError, KeyError, TypeError):  # a line that a killed process did not end
        return False


def _line(record: Mapping[str, Any]) -> bytes:
    """Return a line of JSON; orjson refuses text that is no UTF-8, numbers of more than 64 bits, and objects."""
    return orjson.dumps(_plain(record)) + b"\n"


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: odd text is escaped, a number that no float can be is null."""
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        is_short = isinstance(value, int) and abs(value) < 2**63
        return int(value) if is_short else number if math.isfinite(number) else None
    return str(value).encode(errors="backslashreplace").decode()
