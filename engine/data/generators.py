"""The default generators of torch, Python and numpy: put back after others have drawn, at the cost of a few draws."""

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy
import torch

from engine.errors import UserError

STATE = 625 * 4  # bytes: the 624 words and the position of a Mersenne twister, which numpy and Python both use


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the three generators afterwards. Raises UserError if numpy's default is not a Mersenne twister."""
    state, restore_python, restore_numpy = torch.default_generator.get_state(), _python(), _numpy()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        restore_python()
        restore_numpy()


def _python() -> Callable[[], None]:
    """Return what restores Python's generator. A copy of its memory takes a tenth of the time of `getstate`."""
    if not (address := python_address()):
        return partial(random.setstate, random.getstate())
    generator: Any = random._inst
    state, normal = ctypes.string_at(address, STATE), generator.gauss_next

    def restore() -> None:
        ctypes.memmove(address, state, STATE)
        generator.gauss_next = normal

    return restore


@cache
def python_address() -> int:
    """Return the address of the state of Python's generator; 0 if this interpreter keeps it in an unknown way."""
    if sys.implementation.name != "cpython" or random.Random.__basicsize__ < object.__basicsize__ + STATE:
        return 0
    address = id(random._inst) + object.__basicsize__
    position, *words = (ctypes.c_uint32 * 625).from_address(address)
    return address if (*words, position) == random.getstate()[1] else 0


def _numpy() -> Callable[[], None]:
    """Return what restores numpy's generator. A copy of its memory takes a hundredth of the time of `get_state`.

    But numpy makes normal numbers in pairs, and keeps the second elsewhere. A draw that leaves the memory unchanged was
    the second one: it is put back.
    """
    generator: Any = numpy.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not numpy.random.MT19937:
        raise UserError(f"numpy's default generator is a {type(generator).__name__}: expected MT19937, its own.")
    address = generator.ctypes.state_address
    state = ctypes.string_at(address, STATE)
    normal = numpy.random.standard_normal()
    has_normal = ctypes.string_at(address, STATE) == state

    def restore() -> None:
        ctypes.memmove(address, state, STATE)
        numpy.random.set_bit_generator(generator)  # type: ignore[attr-defined]  # forgets the second normal number
        if has_normal:
            numpy.random.set_state({**numpy.random.get_state(legacy=False), "has_gauss": 1, "gauss": normal})

    return restore
