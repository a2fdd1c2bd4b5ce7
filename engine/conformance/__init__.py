"""The conformance kit: checks that a Strategy keeps what it declares. `python -m engine.conformance --help`.

A check is a function `check_...(backend)`; the first line of its docstring is the promise. It runs real processes, and
raises `BrokenPromiseError` with one sentence, or `NotDeclaredError`.
"""

from engine.conformance.backend import Backend, BrokenPromiseError, NotDeclaredError

__all__ = ["Backend", "BrokenPromiseError", "NotDeclaredError"]
