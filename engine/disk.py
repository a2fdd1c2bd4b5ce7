"""Files of a folder that anybody may have made: reads are bounded, and writes touch nothing outside the folder."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from itertools import chain, count
from pathlib import Path

LARGEST = 1 << 30  # bytes: a larger JSON file is not one of ours
LONGEST = 1 << 24  # bytes: a longer line of JSON is not one of ours


def read_small(path: Path) -> str:
    """Return the text of a regular file of at most LARGEST bytes. Raises ValueError for anything else, or OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return path.read_text()


def lines_of(file: BufferedReader) -> Iterator[str]:
    """Yield the lines of a file. Raises OSError for one of more than LONGEST bytes."""
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise OSError(errno.EFBIG, f"expected lines of at most {LONGEST} bytes. Move the file away", str(file.name))
        yield line.decode(errors="replace")


def numbered(name: str) -> Iterator[Path]:
    """Yield paths of that name until one is free: NAME, NAME-2, NAME-3, ..."""
    return chain([Path(name)], (Path(f"{name}-{number}") for number in count(2)))


def shown(path: Path) -> str:
    """Return a path as people read it: from the working directory, if it is in there."""
    with suppress(OSError, ValueError):  # the working directory is gone, or the path is not in it
        return str(path.relative_to(Path.cwd()))
    return str(path)


def force_to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_part(path: Path) -> Path:
    """Return the name under which a file is written before it replaces `path`; nothing has it, not even a link."""
    part = path.with_name(f".{path.name}.part")
    if os.path.lexists(part):
        part.unlink()
    return part


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = new_part(path)
    part.write_text(text)
    force_to_disk(part)
    part.replace(path)
    force_to_disk(path.parent)
