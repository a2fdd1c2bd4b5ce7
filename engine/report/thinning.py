"""Fewer points, the same extremes. Imports no torch."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BINS = 1000  # a plot is about so many pixels wide


def thin(values: NDArray[np.float64], bins: int = BINS) -> NDArray[np.intp]:
    """Return the places of the points to keep, in order; all of them if they are at most `2 * bins`.

    Otherwise the first, the last, and the lowest and highest of each of `bins` stretches; a gap of NaN keeps one.
    """
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    is_gap = np.isnan(values)
    edges = np.linspace(0, len(values), bins + 1).astype(np.intp)
    lowest = _per_bin(np.where(is_gap, np.inf, values), edges)
    highest = _per_bin(np.where(is_gap, np.inf, -values), edges)
    return np.unique([0, *lowest, *highest, len(values) - 1])


def medians(values: NDArray[np.float64], bins: int = BINS // 4) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the middle places of `bins` stretches, and the median of each; NaN for one of nothing else."""
    edges = np.linspace(0, len(values), bins + 1).astype(np.intp)
    parts = [values[start:end] for start, end in pairwise(edges)]
    finite = [part[~np.isnan(part)] for part in parts]
    return (edges[:-1] + edges[1:]) // 2, np.array([np.median(part) if len(part) else np.nan for part in finite])


def _per_bin(values: NDArray[np.float64], edges: NDArray[np.intp]) -> list[int]:
    """Return where each stretch is lowest."""
    return [int(start + values[start:end].argmin()) for start, end in pairwise(edges)]
