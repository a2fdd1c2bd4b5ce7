"""Seeds of random draws: each depends on the position in the run, never on P, K or earlier draws."""

import random

import numpy
import torch

# They set apart the draws of datasets, of the model, of an epoch's iterables, of host generators, and of validation
FETCH_STREAM, MODEL_STREAM, EPOCH_STREAM, WINDOW_STREAM, VALIDATION_STREAM = 1, 2, 3, 4, 5

# An odd multiplier maps indices one to one to the low 32 bits of a seed; the CPU's generator uses no others
ODD = 0x9E3779B97F4A7C15
SEED_BITS = 0xFFFFFFFFFFFFFFFF


def mix(*numbers: int) -> int:
    """Return a 64-bit hash of whole numbers, for seeds: each bit depends on all of them (the CPU generator uses 32).

    The finaliser is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    state = 0
    for number in numbers:
        state = (state + number + ODD) & SEED_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & SEED_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & SEED_BITS
        state ^= state >> 31
    return state


def seed_host(seed: int) -> None:
    """Seed Python's and numpy's generators."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators, the same on all processes."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would format a traceback for each kind of device that is not there
        torch.default_generator.manual_seed(seed)
    seed_host(seed)


def forward_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's forwards; a micro-batch adds `ODD * seed_index`, so that no seed depends on P."""
    return mix(seed, MODEL_STREAM, epoch)
