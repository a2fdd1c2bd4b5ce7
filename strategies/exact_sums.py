"""Numbers as limbs, which processes can add in any order: no addition rounds."""

from collections.abc import Sequence

LIMBS = 8
"""The limbs of one number, 32 bits each, from 2^-192 up to 2^64. A double holds the sum of 2^21 of them exactly."""
FRACTION = 192
LIMB = 32


def to_limbs(value: float) -> list[float]:
    """Return a number as limbs, the lowest first. Raises ValueError or OverflowError if they cannot hold it exactly."""
    numerator, denominator = value.as_integer_ratio()
    whole, sign = abs(numerator) << FRACTION + 1 - denominator.bit_length(), -1.0 if numerator < 0 else 1.0
    if whole >> LIMB * LIMBS:
        raise OverflowError(f"{value!r} is 2^64 or more.")
    return [sign * (whole >> LIMB * i & 0xFFFFFFFF) for i in range(LIMBS)]


def from_limbs(limbs: Sequence[float]) -> float:
    """Return the number of limbs, or of sums of limbs, rounded once."""
    return sum(int(limb) << LIMB * i for i, limb in enumerate(limbs)) / (1 << FRACTION)
