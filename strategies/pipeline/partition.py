"""The cut of a chain of layers into parts of similar size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from strategies.errors import UserError


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Return the index of the first layer of each part but the first, so that the largest part is as small as possible.

    `sizes` are those of the layers in order. Raises UserError for fewer layers than parts.
    """
    if not 1 <= parts <= len(sizes):
        raise UserError(f"stages={parts}: expected at most as many stages as layers, {len(sizes)}.")
    before = list(accumulate(sizes, initial=0))

    @cache
    def cut(stop: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Return the largest size of `count` parts of the layers before `stop`, and the starts of all but the first."""
        if count == 1:
            return before[stop], ()
        options = ((cut(start, count - 1), start) for start in range(count - 1, stop))
        return min((max(size, before[stop] - before[start]), (*starts, start)) for (size, starts), start in options)

    return list(cut(len(sizes), parts)[1])
