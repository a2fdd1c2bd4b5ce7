"""Callbacks: what happens around updates."""

from engine.callbacks.accumulation import GradientAccumulationScheduler
from engine.callbacks.base import Callback
from engine.callbacks.progress import Progress

__all__ = ["Callback", "GradientAccumulationScheduler", "Progress"]
