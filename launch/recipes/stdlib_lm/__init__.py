"""A byte-level language model of Python's own standard library: padded samples, weighted by tokens."""

from launch.recipes.stdlib_lm.task import StdlibLM

__all__ = ["StdlibLM"]
