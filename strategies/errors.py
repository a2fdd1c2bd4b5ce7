"""The error of a request that cannot be met, and the check of whole numbers that raises it. Imports no torch."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what was expected, and the way out."""


def check_count(name: str, value: object, least: int = 1, why: str = "") -> None:
    """Raise UserError unless `value` is a whole number (not a bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: expected a whole number of at least {least}{why and f'; {why}'}.")
