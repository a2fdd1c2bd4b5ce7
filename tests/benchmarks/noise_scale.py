"""The cost of the noise scale per micro-batch at K=4, on two small models: calls and instructions.

    python tests/benchmarks/noise_scale.py [--calls-only]

The models are that of overhead.py, which is a single layer, and a transformer. The first of each, with which the others
are compared, has a callback that does nothing, and so the same records.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn

from engine import Callback, Trainer
from engine.callbacks import NoiseScale
from tests.benchmarks import counting
from tests.benchmarks.contenders.tally import Linear
from tests.benchmarks.counting import Event
from tests.benchmarks.problem import FEATURES, Feed, N


class Transformer(Linear):
    """Two layers, 64 wide, on sequences of 8."""

    def configure_model(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        ends = nn.Linear(FEATURES // 8, 64), nn.Linear(64, FEATURES // 8)
        return nn.Sequential(nn.Unflatten(1, (8, FEATURES // 8)), ends[0], layers, ends[1], nn.Flatten())


CALLBACKS = {
    "without": Callback,
    "every 10th update": lambda: NoiseScale(10),
    "every update": lambda: NoiseScale(1),
}
MODELS = {"one layer": Linear, "transformer": Transformer}
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
