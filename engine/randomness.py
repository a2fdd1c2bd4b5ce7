"""Random draws of a model (dropout) that depend on a micro-batch's place in the epoch, and not on P or K."""

from __future__ import annotations

import random

import numpy
import torch
from torch import nn

from engine.order import mix
from strategies import Strategy

MODEL_STREAM = 2
"""Sets the draws of the model apart from those of fetching."""

EPOCH_STREAM = 3
"""Sets apart what an epoch's iterables draw from torch's, Python's and numpy's own generators."""

ODD = 0x9E3779B97F4A7C15
"""An odd multiplier takes places one to one to the low 32 bits of a seed, all that the CPU's generator looks at."""


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators, the same on all processes."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


class ModelRandomness:
    """Seeds the model's generators before each micro-batch, for a model that draws.

    Seeding costs something beside a tiny model. A model is taken to draw when a module's name says so (Dropout,
    DropPath), or when it moved the generators in its first window of an epoch, which is always seeded.
    """

    def __init__(self, seed: int, model: nn.Module, strategy: Strategy) -> None:
        self._seed = seed
        self._strategy = strategy
        self._draws = any("drop" in type(module).__name__.lower() for module in model.modules())
        self._epoch = -1
        self._looking = True
        self._seeded: torch.Tensor | None = None

    def start_window(self, epoch: int) -> None:
        """Prepare for a window of `epoch`."""
        if epoch != self._epoch:
            self._epoch, self._looking = epoch, True
            self._key = mix(self._seed, MODEL_STREAM, epoch)

    def seed(self, place: int) -> None:
        """Seed for the micro-batch at `place` in the epoch."""
        if self._draws:
            self._strategy.seed((self._key + place * ODD) & 0xFFFFFFFFFFFFFFFF)
        elif self._looking:
            self._look()
            self._strategy.seed((self._key + place * ODD) & 0xFFFFFFFFFFFFFFFF)
            self._seeded = self._strategy.generator_state()

    def end_window(self) -> None:
        """Note whether the model drew; it has now been looked at, if this process had a micro-batch."""
        if self._seeded is not None:
            self._look()
            self._looking, self._seeded = False, None

    def _look(self) -> None:
        if self._seeded is not None and not torch.equal(self._seeded, self._strategy.generator_state()):
            self._draws = True
