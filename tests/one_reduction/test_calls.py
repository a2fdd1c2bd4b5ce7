"""Lean: how many calls Tally makes around a micro-batch, beside the textbook's loop. Nothing here is timed."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.benchmarks.contenders import contender
from tests.benchmarks.counting import Event, calls
from tests.benchmarks.problem import Feed

CEILINGS = {
    ("Tally, everything off", 1): 22,
    ("Tally, everything off", 8): 22,
    ("Tally as shipped", 1): 66,
    ("Tally as shipped", 8): 31,
}
"""Calls per micro-batch that may be more than the textbook's; a few come by the clock. Lower them when you can."""
SLACK = 0 if sys.version_info[:2] == (3, 11) and torch.__version__.startswith("2.13.") else 4
"""Another Python or torch makes a few calls more or less."""


def run(name: str, K: int, start: Event, stop: Event) -> None:
    contender(name)(Feed(start, stop), K)


@pytest.mark.parametrize(("name", "K"), CEILINGS)
def test_no_more_calls_than_there_were(name: str, K: int) -> None:
    more = calls(run, name, K) - calls(run, "textbook", K)
    assert more <= CEILINGS[name, K] + SLACK, f"{more:.1f} calls more than the textbook's loop"
