"""The lines of metrics.jsonl that a resumed run keeps, and what is wrong with them."""

import json
from collections.abc import Iterable
from io import BufferedReader
from typing import NamedTuple

from engine import disk

BLOCK = 1 << 20
"""Bytes: of a longer file only the end is read, from the last block that begins with a line that stays."""


class End(NamedTuple):
    """The end of a file of records, cut for a resume: all that is before `start` stays."""

    start: int
    kept: bytes
    """The lines from there on that stay."""
    updates: list[int]
    """The updates in it."""
    undone: int
    """The updates that were cut: they are made again."""


def cut(file: BufferedReader, update: int, validated_update: int) -> End:
    """Return the end of `file` without updates after `update` and validations after `validated_update`."""
    start = file.seek(_start_of_end(file, update, validated_update))
    kept, updates, undone = [], [], 0
    for line in disk.lines_of(file):
        number, is_update, stays = _read(line, update, validated_update)
        if stays:
            kept.append(line)
        if is_update and stays:
            updates.append(number)
        undone += is_update and not stays and line.endswith("\n")
    return End(start, "".join(kept).encode(), updates, undone)


def faults(updates: Iterable[int], last: int | None, end: int) -> str:
    """Return what is wrong with updates that should follow `last` (None: unknown) up to `end`; "" if nothing is."""
    found = []
    for update in [*updates, end + 1]:
        due = update if last is None else last + 1
        if update < due:
            found.append(f"update {update} stands twice or out of order")
            continue
        if update > due:
            is_one = update == due + 1
            found.append(f"update {due} is missing" if is_one else f"updates {due} to {update - 1} are missing")
        last = update
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _read(line: str, update: int, validated_update: int) -> tuple[int, bool, bool]:
    """Return the update of a line, whether it is the record of one, and whether it stays."""
    try:
        record = json.loads(line)
        number, is_update = record["update"], "loss" in record
        return number, is_update, line.endswith("\n") and bool(number <= (update if is_update else validated_update))
    except (ValueError, KeyError, TypeError, RecursionError):  # a line that a killed process did not end
        return 0, '"loss"' in line, False


def _start_of_end(file: BufferedReader, update: int, validated_update: int) -> int:
    """Return the offset of the line from which on `file` must be read: in order, all lines before it stay too."""
    start = file.seek(0, 2)
    while (start := max(0, start - BLOCK)) > 0:
        file.seek(start)
        if len(file.readline(disk.LONGEST + 1)) > disk.LONGEST:  # the rest of a line
            return start
        offset = file.tell()
        if _read(file.readline(disk.LONGEST).decode(errors="replace"), update, validated_update)[2]:
            return offset
    return 0
