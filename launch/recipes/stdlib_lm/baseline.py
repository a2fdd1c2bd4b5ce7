"""The loss of counting bytes: `python -m launch.recipes.stdlib_lm.baseline [functions] [max_bytes]`.

A context model of order n predicts a byte by how often it came after the n bytes before it, in the functions that the
recipe trains on; 0.05 is added to each count.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

from launch.recipes.stdlib_lm.functions import train_and_held_out

ADDED = 0.05


def nats_per_byte(order: int, train: Sequence[bytes], held_out: Sequence[bytes]) -> float:
    """Return the cross-entropy of a context model on held-out functions, in nats per byte."""
    counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for text in (bytes(order) + function for function in train):
        for i in range(order, len(text)):
            counts[text[i - order : i]][text[i]] += 1
    totals = {context: counter.total() for context, counter in counts.items()}
    nats, count = 0.0, 0
    for text in (bytes(order) + function for function in held_out):
        for i in range(order, len(text)):
            context = text[i - order : i]
            seen = counts[context][text[i]] if context in totals else 0
            nats -= math.log((seen + ADDED) / (totals.get(context, 0) + 256 * ADDED))
        count += len(text) - order
    return nats / count


if __name__ == "__main__":
    limit, max_bytes = (int(argument) for argument in (sys.argv[1:] or ["1000000000", "1000000000"]))
    splits = [[function[:max_bytes] for function in split] for split in train_and_held_out(limit)]
    for n in range(3):
        print(f"order {n}: {nats_per_byte(n, *splits):.3f} nats per byte, held out")
