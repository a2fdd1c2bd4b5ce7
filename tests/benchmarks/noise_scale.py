"""The cost of the noise scale per micro-batch at K=4, on the small model of overhead.py: calls and instructions.

    python tests/benchmarks/noise_scale.py [--calls-only]

The first, which all are compared with, has a callback that does nothing, and so the same records.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine import Callback
from engine.callbacks import NoiseScale
from tests.benchmarks import counting
from tests.benchmarks.contenders.tally import everything_off
from tests.benchmarks.counting import Event
from tests.benchmarks.problem import Feed

CALLBACKS = {
    "without": Callback,
    "every 20th update": NoiseScale,
    "every update": lambda: NoiseScale(1),
}


def run(name: str, K: int, start: Event, stop: Event) -> None:
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the advice at the end
        everything_off(Feed(start, stop), K, callbacks=CALLBACKS[name]())


if __name__ == "__main__":
    counting.WINDOWS = (4,)
    counting.compare(__file__, str(__doc__), list(CALLBACKS), run, list)
