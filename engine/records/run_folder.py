"""A run's folder, written by process 0: configuration, one record per update, a summary, the final weights."""

import errno
import json
import logging
import math
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.disk import force_to_disk, new_part, numbered, read_small, replace_text
from engine.errors import RunDirTakenError
from engine.records import history
from engine.records.lock import locked

try:
    from orjson import dumps as _dumps
except ImportError:  # no wheel of it for this machine: the same lines, in ten times as many instructions

    def _dumps(value: Any, /) -> bytes:  # type: ignore[misc]
        return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":")).encode()


log = logging.getLogger("tally")


class RunFolder:
    """The folder of one run: a new one, or with `takes_over` that of the run which is resumed.

    Its open files follow the folder if it is moved. Raises RunDirTakenError if anything else is in it or writes it.
    """

    def __init__(self, path: str | Path, takes_over: bool = False) -> None:
        self.path = Path(path)
        _check_is_free(self.path, takes_over)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.path / LOCK)
        self._directory: int | None = os.open(self.path, os.O_RDONLY)
        self._start = uuid.uuid4().hex
        self._config: dict[str, Any] = {}
        self._metrics: FileIO | None = None
        self._events: FileIO | None = None
        self._unwritten = b""
        self._is_full = False
        self.left_out: Mapping[str, str] = {}  # digests of the frozen parameters that are left out of weights
        try:
            _check_is_free(self.path, takes_over)  # another run may have begun before the lock, and ended
        except BaseException:
            self.close()
            raise

    def configure(self, mark: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
        """Write config.json: what identifies the run, an id of this start, and the configuration."""
        self.run = str(mark["run"])  # the same after each resume
        self._config = {MARK: {**mark, "start": self._start}, **configuration}
        self.write("config.json", self._config)

    def rewind(self, update: int, validated_update: int) -> int:
        """Cut records after `update` and `validated_update`, which come again; return the updates cut."""
        path = self.path / "metrics.jsonl"
        path.touch()
        with path.open("rb") as file:
            end = history.cut(file, update, validated_update)
            file.seek(end.start)
            is_cut_at_end = file.read(len(end.kept)) == end.kept and path.stat().st_nlink == 1
        part = path if is_cut_at_end else Path(shutil.copyfile(path, new_part(path)))
        with part.open("r+b") as file:
            file.seek(end.start)
            file.write(end.kept)
            file.truncate()
        force_to_disk(part)
        part.replace(path)
        force_to_disk(self.path)
        self._metrics = path.open("a+b", buffering=0)  # a killed run keeps every line
        self._events = (self.path / EVENTS).open("a+b", buffering=0)
        return end.undone

    @property
    def pinned(self) -> Path:
        """The folder by a path that follows it if it is moved, where the system has one."""
        path = Path(f"/proc/self/fd/{self._directory}")
        return path if path.exists() else self.path

    @property
    def is_lost(self) -> bool:
        """Whether the folder was moved, deleted or replaced: another one, or none, is at `path`."""
        try:
            is_same = os.path.samestat(os.fstat(self._lock.fileno()), (self.path / LOCK).stat())
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
        return not is_same or (read_mark(self.path) or {}).get("start", self._start) != self._start

    def rescue(self) -> "RunFolder":
        """Return a new folder beside a lost one, with configuration and records. Raises OSError."""
        rescued = RunFolder(next(path for path in numbered(f"{self.path}-lost") if not os.path.lexists(path)))
        rescued.write("config.json", self._config)
        for name, file in (("metrics.jsonl", self._metrics), (EVENTS, self._events)):
            assert file is not None
            file.seek(0)
            (rescued.path / name).write_bytes(file.readall() + (self._unwritten if file is self._metrics else b""))
        rescued._events = (rescued.path / EVENTS).open("a+b", buffering=0)
        return rescued

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; if the disk is full, keep it for the next time."""
        try:
            self._unwritten += _dumps(record) + b"\n"  # a number that is not finite becomes null
        except TypeError:  # orjson refuses text that is no UTF-8, numbers of more than 64 bits, and objects
            self._unwritten += _dumps(_plain(record)) + b"\n"
        try:
            while self._unwritten and self._metrics is not None:  # as `flush`, without a call
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                log.error("metrics.jsonl could not be written: %s. Training continues and keeps the lines.", error)
            self._is_full = True

    def flush(self) -> None:
        """Write the lines that are still in memory. Raises OSError."""
        while self._unwritten and self._metrics is not None:
            self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def force_to_disk(self) -> None:
        """Wait until the records so far are on disk. Raises OSError."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Append one line to events.jsonl, which no resume cuts."""
        try:
            if self._events is not None:
                self._events.write(_dumps(_plain(event)) + b"\n")
        except OSError as error:
            log.error("events.jsonl could not be written: %s. Training continues without the line.", error)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        replace_text(self.path / name, json.dumps(_plain(content), indent=2) + "\n")

    def save_weights(self, state: Mapping[str, Any], name: str = "model.safetensors") -> None:
        """Write a model under the user's own parameter names: tensors, and no extra state."""
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, Tensor)},
            self.path / name,
            {LEFT_OUT: json.dumps(self.left_out)} if self.left_out else None,
        )

    def close(self) -> None:
        """Write the lines that are still in memory, and release the lock. Raises OSError if the lines are lost."""
        try:
            self.flush()
        finally:
            for file in (self._metrics, self._events, self._lock):
                if file is not None:
                    file.close()
            if self._directory is not None:
                os.close(self._directory)
            self._metrics = self._events = self._directory = None


MARK = "a run of Tally"  # the key of config.json that has the ids of the run and of its newest start
LEFT_OUT = "frozen parameters left out by Tally"  # the key of the metadata of weights that has their digests
LOCK = ".lock"
EVENTS = "events.jsonl"  # it is appended to in place: a hard link would change another file too


def read_mark(path: Path) -> dict[str, Any] | None:
    """Return what config.json says of the run in a folder; None if it is missing, unreadable or another's."""
    try:
        config = json.loads(read_small(path / "config.json"))
        return config[MARK] if isinstance(config[MARK], dict) else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def check_plain(folder: Path) -> None:
    """Raise RunDirTakenError for a link or device in a run's folder: following it could leave the folder or hang."""
    for within in (folder, folder / "checkpoints", *(folder / "checkpoints").glob("update-*"), folder / "tensorboard"):
        for entry in os.scandir(within) if within.is_dir() else ():
            status = entry.stat(follow_symlinks=False)
            is_shared = entry.name == EVENTS and status.st_nlink > 1
            if is_shared or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise RunDirTakenError(
                    f"run_dir={str(folder)!r}: expected files and folders only, found a link or device: "
                    f"{Path(entry.path).relative_to(folder)}. Remove it, or use a new folder."
                )


def _check_is_free(path: Path, takes_over: bool) -> None:
    if path.is_dir():
        check_plain(path)
        is_run = any(path.glob("checkpoints/update-*/manifest.json")) or read_mark(path) is not None
        if (takes_over and is_run) or all(entry.name == LOCK for entry in path.iterdir()):
            return
    if path.exists():
        way_out = "a new folder" if takes_over else "a new folder, or resume='auto'"
        raise RunDirTakenError(f"run_dir={str(path)!r}: expected a folder that nothing else is in. Use {way_out}.")


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: odd text is escaped, a number that no float can be is null."""
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if getattr(value, "ndim", 1) == 0:  # a callback has added a tensor
        value = float(value)
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        is_short = isinstance(value, int) and abs(value) < 2**63
        return int(value) if is_short else number if math.isfinite(number) else None
    return str(value).encode(errors="backslashreplace").decode()
