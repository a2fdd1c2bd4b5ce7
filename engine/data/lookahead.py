"""Reading one item ahead, so that an iterator knows its end; and resuming where one was left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import chain, islice
from typing import Any

from engine.errors import UserError
from engine.signals import shielded

log = logging.getLogger("tally")


class Lookahead:
    """An iterator that knows whether it has a next item; an exception met ahead comes when its item is asked for.

    It resumes from a `position` by the data's own `load_state_dict`, else by reading and dropping as many items.
    `begin` is applied to each item as soon as it is read.
    """

    def __init__(
        self, data: Any, position: Mapping[str, Any] | None = None, begin: Callable[[Any], Any] | None = None
    ) -> None:
        self._data = data
        self._has_state = has_state(data)
        self._state: Any = None
        self._error: Exception | None = None
        self.ahead: Any = None  # the item that was read ahead; None if nothing was read, or an error in its place
        self._taken = 0
        self.has_next = True
        if position is not None and position["has_ended"]:
            self.has_next = False
            return
        try:
            if position is not None and self._has_state:
                data.load_state_dict(position["state"])
            self._keep_state()
            with shielded():  # the first read, too: a generator starts its loader's workers in it
                items = iter(data)
                self._items: Iterator[Any] = chain(list(islice(items, 1)), items)
            if position is not None and not self._has_state:
                self._skip(int(position["taken"]))
            if begin is not None:
                self._items = map(begin, self._items)
        except Exception as error:
            self._error = error
        else:
            self.take()
        self._taken = 0 if position is None else int(position["taken"])

    @property
    def position(self) -> dict[str, Any]:
        """The position of the stream before the item that was read ahead."""
        return {"taken": self._taken, "has_ended": not self.has_next, "state": self._state}

    def take(self, keeps_state: bool = False) -> Any:
        """Return the item that was read ahead, and read the next, keeping the data's state from between."""
        if self._error is not None:
            raise self._error
        item = self.ahead
        self._taken += 1
        if keeps_state:
            self._keep_state()
        try:
            self.ahead = next(self._items)
        except StopIteration:
            self.has_next = False
        except Exception as error:
            self._error = error
        return item

    def _keep_state(self) -> None:
        if self._has_state:
            self._state = deepcopy(self._data.state_dict())

    def _skip(self, count: int) -> None:
        log.warning("reading %d micro-batches again and dropping them: the stream has no state_dict to load", count)
        for number in range(count):
            if next(self._items, self) is self:
                raise UserError(
                    f"the stream ended after {number} micro-batches, but {count} had been trained on. To resume, it "
                    "must yield the same ones again, or have state_dict and load_state_dict."
                )


def has_state(data: object) -> bool:
    """Whether an iterable can resume by itself."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))
