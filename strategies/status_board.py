"""Texts that processes leave for one another in the store in which they met."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE = 3.0
"""Seconds for which a store may be silent."""


class StatusBoard:
    """This process's side of a store: each of `size` processes writes, and all read without the writer's help."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._unanswered: threading.Thread | None = None

    def post(self, topic: str, text: str) -> None:
        """Put `text` into the store; a later one replaces it."""
        self._patiently(lambda: self._store.set(f"{topic}/{self._rank}", text))

    def posted(self, topic: str) -> dict[int, str]:
        """Return the texts by rank; none where the store went with the process or the host that kept it."""
        found: dict[int, str] = {}

        def read() -> None:
            for rank in range(self._size):
                if self._store.check([key := f"{topic}/{rank}"]):
                    found[rank] = self._store.get(key).decode()

        self._patiently(read)
        return dict(found)

    def _patiently(self, use_store: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Use the store, but not for long: a host that is gone answers nothing, and TCP would wait for minutes.

        While it does not answer it is not asked again. An interpreter that ends waits for it as long once more: a
        thread that came back from the store later would abort it.
        """

        def attempt() -> None:
            with suppress(RuntimeError):
                use_store()

        if self._unanswered is not None and self._unanswered.is_alive():
            return
        thread = threading.Thread(target=attempt, name="tally-notes", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self._unanswered = thread
            atexit.register(thread.join, PATIENCE)
