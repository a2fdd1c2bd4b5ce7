"""The lines of metrics.jsonl that a resumed run keeps, and what is wrong with them."""

from __future__ import annotations

import json
from io import BufferedReader

from engine import disk

BLOCK = 1 << 20
"""Bytes: of a longer file only the end is read, from the last block that begins with a line that stays."""


class History:
    """Decides line by line what stays: updates up to `update`, validations up to `validated_update`.

    `branched_at` is the update after which the history begins; None if it is unknown.
    """

    def __init__(self, update: int, validated_update: int, branched_at: int | None = 0) -> None:
        self._update, self._validated_update = update, validated_update
        self._last = branched_at
        self._faults: list[str] = []
        self._fault_count = 0
        self.undone = 0
        """The updates that were cut: they are made again."""

    def begin_at(self, offset: int) -> None:
        """Begin at an offset of the file: what is missing before it is unknown."""
        self._last = None if offset else self._last

    def stays(self, line: str) -> bool:
        """Whether a line stays; in a file in order, all lines before it stay too."""
        return self._read(line)[2]

    def _read(self, line: str) -> tuple[int, bool, bool]:
        """Return the update of a line, whether it is the record of one, and whether it stays."""
        try:
            record = json.loads(line)
            update, is_update = record["update"], "loss" in record
            stays = line.endswith("\n") and bool(update <= (self._update if is_update else self._validated_update))
            return update, is_update, stays
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that a killed process did not end
            return 0, '"loss"' in line, False

    def take(self, line: str) -> bool:
        """Take the next line: note what is wrong with it, and return whether it stays."""
        update, is_update, stays = self._read(line)
        if is_update and stays:
            self._see(update)
        self.undone += is_update and not stays and line.endswith("\n")
        return stays

    def _see(self, update: int) -> None:
        if self._last is None:
            self._last = update - 1
        if update <= self._last:
            self._note(f"update {update} stands twice or out of order")
        else:
            self._note_missing(update - 1)
            self._last = update

    def _note_missing(self, last: int) -> None:
        """Note the updates after the last one seen, up to `last`."""
        first = last + 1 if self._last is None else self._last + 1
        if first <= last:
            self._note(f"update {first} is missing" if first == last else f"updates {first} to {last} are missing")

    def _note(self, fault: str) -> None:
        self._fault_count += 1
        if self._fault_count <= 3:
            self._faults.append(fault)

    def faults(self) -> str:
        """Return what is wrong with the lines that stay, after the last of them; "" if nothing is."""
        self._note_missing(self._update)
        more = f"; and {self._fault_count - 3} more" if self._fault_count > 3 else ""
        return "; ".join(self._faults) + more


def start_of_end(file: BufferedReader, history: History) -> int:
    """Return the offset of the line from which on `file` must be read: all lines before it stay."""
    start = file.seek(0, 2)
    while (start := max(0, start - BLOCK)) > 0:
        file.seek(start)
        if len(file.readline(disk.LONGEST + 1)) > disk.LONGEST:  # the rest of a line
            return start
        offset = file.tell()
        if history.stays(file.readline(disk.LONGEST).decode(errors="replace")):
            return offset
    return 0
