"""Callbacks: what happens around updates."""

from engine.callbacks.accumulation import GradientAccumulationScheduler
from engine.callbacks.base import Callback
from engine.callbacks.early_stopping import EarlyStopping
from engine.callbacks.ema import EMA
from engine.callbacks.learning_rate import EpochLR, PlateauLR
from engine.callbacks.profiler import Profiler
from engine.callbacks.progress import Progress

__all__ = [
    "EMA",
    "Callback",
    "EarlyStopping",
    "EpochLR",
    "GradientAccumulationScheduler",
    "PlateauLR",
    "Profiler",
    "Progress",
]
