"""Output that outlives its reader: a closed pipe or a full disk behind stdout loses lines and ends no run."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Output:
    """A text stream whose writes never fail. What its encoding cannot hold is escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream or Path(os.devnull).open("w")  # noqa: SIM115 - closed by who started this process

    def write(self, text: str) -> int:
        """Write what can be written, and return the length of all."""
        with suppress(OSError, ValueError):  # ValueError: somebody has closed it
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be done."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """Print `text` on stdout at once."""
    print(text, file=Output(sys.stdout), flush=True)
