"""The cost of the noise scale per micro-batch at K=4, on two small models: calls and instructions.

    python tests/benchmarks/noise_scale.py [--calls-only]

The models are that of overhead.py, which is a single layer, and a perceptron of five. They are compared with a run
whose callback does nothing, so that it has the same records.
"""

from __future__ import annotations

import contextlib
import os
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn

from engine import Callback, Trainer
from engine.callbacks import NoiseScale
from tests.benchmarks import counting
from tests.benchmarks.contenders.tally import Linear
from tests.benchmarks.counting import Event
from tests.benchmarks.problem import FEATURES, Feed, N


class Perceptron(Linear):
    """Four hidden layers of 256: still small."""

    def configure_model(self) -> nn.Module:
        widths = [FEATURES, 256, 256, 256, 256, FEATURES]
        return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())))


CALLBACKS = {
    "without": Callback,
    "every 10th update": lambda: NoiseScale(10),
    "every update": lambda: NoiseScale(1),
}
MODELS = {"one layer": Linear, "five layers": Perceptron}
RUNS = {f"{model}, {how}": (model, how) for model in MODELS for how in CALLBACKS}


def run(name: str, K: int, start: Event, stop: Event) -> None:
    model, how = RUNS[name]
    trainer = Trainer("single", N, K, max_epochs=1, skip_nonfinite_updates=False, callbacks=CALLBACKS[how]())
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the advice at the end
        trainer.fit(MODELS[model](Feed(start, stop)))


if __name__ == "__main__":
    counting.WINDOWS = (4,)
    bases = [name for name, (_, how) in RUNS.items() if how == "without"]
    counting.compare(__file__, str(__doc__), list(RUNS), run, list, bases)
