"""Errors that a user can fix, and the check of a whole number. This module imports nothing."""

MODEL_NOT_CALLED = (
    "the loss was not computed with the `model` that loss() is given: call that one. Where nothing is to be learned, "
    "return Loss(0 * output.sum(), 0)."
)


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what was expected and the way out."""


def check_count(name: str, value: object, least: int = 1, why: str = "") -> None:
    """Raise UserError unless `value` is a whole number of at least `least`; the message ends with `why`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        reason = f" {why}" if why else ""
        raise UserError(f"{name}={value!r}: expected a whole number of at least {least}.{reason}")
