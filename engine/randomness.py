"""Random draws that depend on the place in the run, and not on P, K or what was drawn before."""

from __future__ import annotations

import random

import numpy
import torch

from engine.order import mix
from strategies import Strategy

MODEL_STREAM, EPOCH_STREAM, VALIDATION_STREAM = 2, 3, 5
"""Set apart the draws of models, of an epoch's iterables, and of validation."""

ODD = 0x9E3779B97F4A7C15
"""An odd multiplier takes places one to one to the low 32 bits of a seed, all that the CPU's generator looks at."""


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators, the same on all processes."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


class ModelRandomness:
    """Seeds torch's generators, from which a forward draws, by a micro-batch's place: dropout does not know P."""

    def __init__(self, seed: int, strategy: Strategy) -> None:
        self._seed = seed
        self._seed_generators = strategy.seed
        self._epoch = -1

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the micro-batches of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._key = epoch, mix(self._seed, MODEL_STREAM, epoch)

    def seed(self, place: int) -> None:
        """Seed for the micro-batch at `place` in the epoch."""
        self._seed_generators((self._key + place * ODD) & 0xFFFFFFFFFFFFFFFF)
