"""Reads a run's folder, whole or damaged. Imports no torch."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.disk import lines_of, read_small

Column = NDArray[np.float64]  # one number for each record; NaN if a record has no such number


VALIDATION = "validation/"  # begins the names of validation means


class NotARunError(ValueError):
    """The folder is not that of a run; the message says the way out."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    name: str
    path: Path
    updates: dict[str, Column]  # metrics.jsonl by field, one entry per update, in order
    validations: dict[str, Column]  # by name, one entry per validation
    events: Sequence[dict[str, Any]]  # starts, ends, saves and what else happened, as they came
    config: dict[str, Any]
    summary: dict[str, Any]  # of a run that came to its end; else empty
    notes: Sequence[str]  # the lines and files that could not be read

    @property
    def length(self) -> int:
        """The number of updates on record."""
        return len(self.updates["update"])

    def happened(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.get("event") in kinds]


def read(folder: str | Path) -> Run:
    """Read the folder of a run, ended or not. Raises NotARunError without a metrics.jsonl, and OSError."""
    path = Path(folder)
    if not (path / "metrics.jsonl").is_file():
        raise NotARunError(_refusal(path))
    notes: list[str] = []
    records = _lines(path / "metrics.jsonl", notes)
    records.sort(key=lambda record: float(record["update"]))  # they are sorted unless somebody joined two files
    updates = _columns(record for record in records if "loss" in record)
    validations = _columns(record for record in records if "loss" not in record)
    after = np.searchsorted(updates["update"], validations["update"], side="right")
    validations["samples"] = np.concatenate(([0.0], updates["samples"]))[after]
    events = _lines(path / "events.jsonl", notes) if (path / "events.jsonl").is_file() else []
    config = _object(path / "config.json", notes)
    summary = _object(path / "summary.json", notes) if (path / "summary.json").is_file() else {}
    return Run(path.resolve().name, path, updates, validations, events, config, summary, notes)


def _refusal(path: Path) -> str:
    if not path.is_dir():
        return f"{str(path)!r} is not a folder: name the folder of a run, as runs/latest."
    within = sorted(history.parent for history in path.glob("*/metrics.jsonl") if not history.parent.is_symlink())
    names = ", ".join(str(run) for run in within[-3:])
    way_out = f"the newest in it: {names}" if within else "name a folder that a run has written, as runs/latest"
    return f"{str(path)!r} is not the folder of a run: it has no metrics.jsonl; {way_out}."


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, each with a number as its `update`."""
    records, lost = [], 0
    with path.open("rb") as file:
        for line in lines_of(file):
            record = _decoded(line) if line.endswith("\n") else None
            if isinstance(record, dict) and np.isfinite(number(record.get("update"))):
                records.append(record)
            else:
                lost += 1
    if lost:
        notes.append(f"{path.name}: {lost} of {lost + len(records)} lines could not be read and are left out.")
    return records


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = _decoded(read_small(path))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} could not be read.")
    return {}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _columns(records: Iterable[dict[str, Any]]) -> dict[str, Column]:
    """Return the fields that hold a number in any record; `update` and `samples` always."""
    rows = list(records)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([number(row.get(name)) for row in rows], dtype=np.float64) for name in names}
    found = {name: column for name, column in columns.items() if np.isfinite(column).any()}
    return {"update": np.zeros(0), "samples": np.full(len(rows), np.nan), **found}


def number(value: Any) -> float:
    """Return a number that a plot can show; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and abs(value) <= 1e300 else np.nan
    except OverflowError:  # a whole number of hundreds of digits
        return np.nan
