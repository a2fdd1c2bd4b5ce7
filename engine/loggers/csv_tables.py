"""The CSV logger: tables for a spreadsheet."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from engine.loggers.base import Start
from engine.loggers.grouped import GroupedLogger


class CSVLogger(GroupedLogger):
    """Writes two tables into the run_dir: `metrics.csv` by update, and `validation.csv` by validation."""

    needs_run_dir = True

    def open(self, start: Start) -> None:
        super().open(start)
        self._updates = _Table(self._folder / "metrics.csv", start.update)
        self._validations = _Table(self._folder / "validation.csv", start.validated_update)

    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        (self._updates if is_update else self._validations).append({"update": update, **values})

    def close(self) -> None:
        self._updates.close()
        self._validations.close()


class _Table:
    """One file: the first line names the columns, the first column is the update."""

    def __init__(self, path: Path, update: int) -> None:
        self._path = path
        self._file: TextIO | None = None
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        self._columns = next(csv.reader(lines[:1]), [])
        if lines:
            self._rewrite(self._columns, [line for line in lines[1:] if _is_before(line, update)])

    def append(self, row: Mapping[str, float]) -> None:
        if missing := [name for name in row if name not in self._columns]:
            self._widen(missing)
        if self._file is None:
            self._file = self._path.open("a", buffering=1, newline="")  # a killed run keeps every line
        csv.writer(self._file, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _widen(self, names: list[str]) -> None:
        """Add columns: empty in the rows that are there."""
        self.close()
        rows = self._path.read_text().splitlines()[1:] if self._columns else []
        self._rewrite([*self._columns, *names], [f"{row}{',' * len(names)}\n" for row in rows])

    def _rewrite(self, columns: list[str], rows: list[str]) -> None:
        part = self._path.with_suffix(".part")
        with part.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(columns)
            file.writelines(rows)
        part.replace(self._path)
        self._columns = columns  # once the file has them: a disk may be full


def _is_before(line: str, update: int) -> bool:
    number = line.split(",", 1)[0]
    return line.endswith("\n") and number.isdecimal() and int(number) <= update  # a killed process ends no line
