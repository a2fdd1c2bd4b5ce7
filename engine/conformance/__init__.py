"""The conformance kit: does a Strategy keep the promises that it declares? `python -m engine.conformance --help`.

Each check is a function whose name begins with `check_` and whose first line is the promise. It takes a `Backend`, runs
real processes, and raises `BrokenPromiseError` with one sentence. `traffic`, `contract`, `exactness`, `keeping` and
`failures` hold them; pytest runs them.
"""

from engine.conformance.backend import Backend, BrokenPromiseError

__all__ = ["Backend", "BrokenPromiseError"]
