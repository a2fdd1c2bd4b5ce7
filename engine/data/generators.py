"""The default generators of torch, Python and numpy around a fetch, so that a dataset's draws disturb nobody's."""

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from engine.errors import UserError

MT19937_BYTES = 625 * 4
"""The state of numpy's default generator: 624 words, and a position."""


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore torch's, Python's and numpy's default generators afterwards, at the cost of a few draws.

    `numpy.random.get_state` is 100 times slower than a copy of the generator's memory. But numpy makes normal numbers
    in pairs and keeps the second elsewhere. A draw that leaves the memory unchanged was the second one: it is put back.
    """
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    generator = numpy.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not numpy.random.MT19937:
        raise UserError(f"numpy's default generator is a {type(generator).__name__}: expected MT19937, its own.")
    address = generator.ctypes.state_address
    numpy_state = ctypes.string_at(address, MT19937_BYTES)
    normal = numpy.random.standard_normal()
    has_normal = ctypes.string_at(address, MT19937_BYTES) == numpy_state
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        ctypes.memmove(address, numpy_state, MT19937_BYTES)
        numpy.random.set_bit_generator(generator)  # type: ignore[attr-defined]  # forgets the second normal number
        if has_normal:
            numpy.random.set_state({**numpy.random.get_state(legacy=False), "has_gauss": 1, "gauss": normal})
