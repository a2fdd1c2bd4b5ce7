"""The status board: texts that each process publishes in the store of the process group."""

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from strategies.host_messages import HostMessages

PATIENCE = 3.0  # seconds to wait for an answer of the store


class StatusBoard(HostMessages):
    """One process's access to the store: each of `size` processes writes, and all read without the writer's help."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._unanswered: threading.Thread | None = None

    def post(self, topic: str, text: str) -> None:
        self._patiently(lambda: self._store.set(f"{topic}/{self._rank}", text))

    def posted(self, topic: str) -> dict[int, str]:
        texts: dict[int, str] = {}

        def read() -> None:
            keys = [f"{topic}/{rank}" for rank in range(self._size)]
            if self._store.check(keys):  # two requests, if all have posted
                texts.update(enumerate(text.decode() for text in self._store.multi_get(keys)))
                return
            for rank, key in enumerate(keys):
                if self._store.check([key]):
                    texts[rank] = self._store.get(key).decode()

        self._patiently(read)
        return dict(texts)

    def report(self, failure: str) -> None:
        text = f"process {self._rank} failed: {failure}"
        self._patiently(lambda: self._store.compare_set("failure", "", text))

    def reported(self) -> str:
        texts: list[bytes] = []
        self._patiently(lambda: texts.extend(self._store.multi_get(["failure"] * self._store.check(["failure"]))))
        return texts[0].decode() if texts else ""

    def _patiently(self, use_store: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Use the store for at most `seconds`, and not at all while it does not answer: TCP would wait for minutes."""

        def attempt() -> None:
            with suppress(RuntimeError):
                use_store()

        if self._unanswered is not None and self._unanswered.is_alive():
            return
        thread = threading.Thread(target=attempt, name="tally-status-board", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self._unanswered = thread
            # wait once more at the interpreter's end: a thread that returned from the store later would abort it
            atexit.register(thread.join, PATIENCE)
