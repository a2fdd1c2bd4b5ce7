"""Where to cut a chain of layers, so that the parts are of like size: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Return where each part but the first begins, such that the largest part is as small as it can be.

    `sizes` are those of the layers in order; each part gets at least one layer. Raises ValueError for fewer layers than
    parts.
    """
    if not 1 <= parts <= len(sizes):
        raise ValueError(f"{len(sizes)} layers cannot be cut into {parts} parts.")
    before = list(accumulate(sizes, initial=0))

    @cache
    def cut(stop: int, count: int) -> tuple[int, tuple[int, ...]]:
        """The size of the largest of `count` parts of the layers before `stop`, and where the later ones begin."""
        if count == 1:
            return before[stop], ()
        options = ((cut(start, count - 1), start) for start in range(count - 1, stop))
        return min((max(size, before[stop] - before[start]), (*starts, start)) for (size, starts), start in options)

    return list(cut(len(sizes), parts)[1])
