"""The conformance kit: does a Strategy keep the promises that it declares? `python -m engine.conformance --help`.

Each check is a function whose name begins with `check_` and whose first line is the promise. It takes a `Backend`, runs
real processes, and raises `BrokenPromiseError` with one sentence, or `NotDeclaredError`. pytest runs them, in order.
"""

from engine.conformance.backend import Backend, BrokenPromiseError, NotDeclaredError

CHECKS = tuple(f"engine.conformance.{name}" for name in ("contract", "traffic", "exactness", "keeping", "failures"))
"""The modules that hold them."""

__all__ = ["CHECKS", "Backend", "BrokenPromiseError", "NotDeclaredError"]
