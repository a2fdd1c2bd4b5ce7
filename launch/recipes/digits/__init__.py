"""Handwritten digits: the recipe that `engine/run.py` trains by default."""

from launch.recipes.digits.task import Digits

__all__ = ["Digits"]
