"""Handwritten digits: the recipe that `engine/run.py` trains when it is told nothing else."""

from launch.recipes.digits.task import Digits

__all__ = ["Digits"]
