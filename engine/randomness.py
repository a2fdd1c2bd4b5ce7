"""Random draws that depend on the place in the run, and not on P, K or what was drawn before."""

from __future__ import annotations

import random

import numpy
import torch

from engine.order import mix
from strategies import Strategy

MODEL_STREAM, EPOCH_STREAM, WINDOW_STREAM, VALIDATION_STREAM = 2, 3, 4, 5
"""Set apart the draws of models, of an epoch's iterables, of Python's and numpy's generators, and of validation."""

ODD = 0x9E3779B97F4A7C15
"""An odd multiplier takes places one to one to the low 32 bits of a seed, all that the CPU's generator looks at."""


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators, the same on all processes."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


class ModelRandomness:
    """Seeds what a forward draws from.

    torch's generators, before each micro-batch, by its place in the epoch: dropout does not know P. Python's and
    numpy's, which cost more, before each window of a run that can be resumed: it then draws as one that was not
    interrupted.
    """

    def __init__(self, seed: int, strategy: Strategy, can_be_resumed: bool) -> None:
        self._seed = seed
        self._strategy = strategy
        self._can_be_resumed = can_be_resumed
        self._epoch = -1

    def start_window(self, epoch: int, update: int) -> None:
        """Prepare for the window of an update."""
        if epoch != self._epoch:
            self._epoch, self._key = epoch, mix(self._seed, MODEL_STREAM, epoch)
        if self._can_be_resumed:
            seed = mix(self._seed, WINDOW_STREAM, update, self._strategy.data_parallel_rank)
            random.seed(seed)
            numpy.random.seed(seed & 0xFFFFFFFF)

    def seed(self, place: int) -> None:
        """Seed for the micro-batch at `place` in the epoch."""
        self._strategy.seed((self._key + place * ODD) & 0xFFFFFFFFFFFFFFFF)
