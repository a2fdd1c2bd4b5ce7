"""Generators that datasets draw from: all three seeded; Python's and numpy's put back after a dataset has drawn.

Both are Mersenne twisters. Their memory is copied, which takes less than a tenth of the time of `getstate` and
`get_state`; these are called if the memory does not look as expected. Torch's is not put back: each forward seeds it.
"""

import ctypes
import random
import struct
import sys
from functools import lru_cache
from typing import Any

import numpy
import torch

from engine.errors import UserError

WORDS = 624  # of 4 bytes each: the numbers of a generator; Python keeps its position before, numpy after them
STATE = 4 * (WORDS + 1)
NO_NORMAL = bytes(16)

_python: Any = random._inst
_numpy: Any = numpy.random.get_state.__self__  # type: ignore[attr-defined]
_torch, _numbers = torch.default_generator, torch.empty(2 * STATE // 8, dtype=torch.int64, device="cpu")
_states = _numbers.numpy().data.cast("B")  # the same memory, as a state of Python's and one of numpy's
_words, _for_python, _for_numpy = _states.cast("I"), _states[:STATE], _states[STATE:]

Memory = tuple[memoryview, memoryview, memoryview]
"""Of Python's generator, of numpy's, and of the second normal number that numpy keeps of a pair."""


def saved() -> tuple[Any, ...]:
    """Return what `restore` needs, which is equal until somebody draws."""
    bits = _numpy._bit_generator
    if (memory := memory_with(bits)) is None:
        name, words, *rest = _numpy.get_state()
        return bits, random.getstate(), (name, words.tolist(), *rest)
    python, words, normal = memory
    with bits.lock:
        return bits, _python.gauss_next, python.tobytes(), words.tobytes(), normal.tobytes()


def restore(bits: Any, of_python: Any, *rest: Any) -> None:
    """Put back what `saved` returned."""
    if _numpy._bit_generator is not bits:
        numpy.random.set_bit_generator(bits)  # type: ignore[attr-defined]
    if (memory := memory_with(bits)) is None:
        random.setstate(of_python)
        _numpy.set_state(*rest)
        return
    python, words, normal = memory
    with bits.lock:
        _python.gauss_next, python[:], words[:], normal[:] = of_python, *rest


def seed_all(seed: int) -> None:
    """Seed torch's generator, and let it draw the numbers of the others: their own seeding takes longer."""
    _torch.manual_seed(seed)
    _numbers.random_(-(1 << 63), None)  # 64 random bits each
    _words[0] = _words[-1] = WORDS  # the positions: at the end of the numbers
    if (memory := memory_with(bits := _numpy._bit_generator)) is None:
        random.setstate((3, (*_words[1 : WORDS + 1], WORDS), None))
        _numpy.set_state(("MT19937", [*_words[WORDS + 1 : -1]], WORDS, 0, 0.0))
        return
    python, words, normal = memory
    with bits.lock:
        python[:], words[:], normal[:], _python.gauss_next = _for_python, _for_numpy, NO_NORMAL, None


@lru_cache(1)
def memory_with(bits: Any) -> Memory | None:
    """Return the memory of the generators, numpy's with `bits`; None if it is not as expected.

    Copy it under `bits.lock`: other threads run while numpy draws. Raises UserError for `bits` of another kind.
    """
    if type(bits) is not numpy.random.MT19937:
        raise UserError(f"numpy's default generator is a {type(bits).__name__}: expected MT19937, its own.")
    if sys.implementation.name != "cpython" or random.Random.__basicsize__ < object.__basicsize__ + STATE:
        return None
    python = _view(id(_python) + object.__basicsize__, STATE)
    words = _view(bits.ctypes.state_address, STATE)
    kind = numpy.random.RandomState
    trial = kind(0)
    trial.standard_normal()
    normal = struct.pack("qd", 1, trial.get_state(legacy=False)["gauss"])
    offset = _view(id(trial), kind.__basicsize__).tobytes().find(normal)
    (position, *numbers), state = python.cast("I"), bits.state["state"]
    is_known = (*numbers, position) == random.getstate()[1] and [*words.cast("I")] == [*state["key"], state["pos"]]
    return (python, words, _view(id(_numpy) + offset, len(normal))) if is_known and offset >= 0 else None


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
