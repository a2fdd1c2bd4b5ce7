"""The lines of metrics.jsonl that a resumed run keeps."""

import json
from io import BufferedReader
from typing import NamedTuple

from engine import disk

# Bytes: of a longer file only the end is read, from the last block that begins with a line that stays
BLOCK = 1 << 20


class End(NamedTuple):
    """The end of a file of records, cut for a resume: all that is before `start` stays."""

    start: int
    kept: bytes  # the lines from there on that stay
    undone: int  # the updates that were cut: they are made again


def cut(file: BufferedReader, update: int, validated_update: int) -> End:
    """Return the end of `file` without updates after `update` and validations after `validated_update`."""
    start = file.seek(_start_of_end(file, update, validated_update))
    kept, undone = [], 0
    for line in disk.lines_of(file):
        is_update, stays = _read(line, update, validated_update)
        if stays:
            kept.append(line)
        undone += is_update and not stays and line.endswith("\n")
    return End(start, "".join(kept).encode(), undone)


def _read(line: str, update: int, validated_update: int) -> tuple[bool, bool]:
    """Return whether a line is the record of an update, and whether it stays."""
    try:
        record = json.loads(line)
        is_update = "loss" in record
        is_before = record["update"] <= (update if is_update else validated_update)
        return is_update, line.endswith("\n") and bool(is_before)
    except (ValueError, KeyError, TypeError, RecursionError):  # a line that a killed process did not end
        return '"loss"' in line, False


def _start_of_end(file: BufferedReader, update: int, validated_update: int) -> int:
    """Return the offset of the line from which on `file` must be read: in order, all lines before it stay too."""
    start = file.seek(0, 2)
    while (start := max(0, start - BLOCK)) > 0:
        file.seek(start)
        if len(file.readline(disk.LONGEST + 1)) > disk.LONGEST:  # the rest of a line
            return start
        offset = file.tell()
        if _read(file.readline(disk.LONGEST).decode(errors="replace"), update, validated_update)[1]:
            return offset
    return 0
