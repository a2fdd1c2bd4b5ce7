"""Random draws that depend on the place in the run, and not on P, K or what was drawn before."""

from __future__ import annotations

import random

import numpy
import torch

from engine.order import mix

MODEL_STREAM, EPOCH_STREAM, VALIDATION_STREAM = 2, 3, 5
"""Set apart the draws of models, of an epoch's iterables, and of validation."""

ODD = 0x9E3779B97F4A7C15
"""An odd multiplier takes places one to one to the low 32 bits of a seed, all that the CPU's generator looks at."""
SEED_BITS = 0xFFFFFFFFFFFFFFFF


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators, the same on all processes."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


def epoch_key(seed: int, epoch: int) -> int:
    """Return the seed of what a forward draws, less `ODD * place`: by the place in the epoch, so it knows no P."""
    return mix(seed, MODEL_STREAM, epoch)
