"""Those who are measured, one file each: functions `(data, K) -> model`, written as their own docs would."""

from __future__ import annotations

from importlib import import_module

from tests.benchmarks.problem import Contender

WHERE = {
    "textbook": "textbook.train",
    "hand-tuned": "hand_tuned.train",
    "Tally, everything off": "tally.everything_off",
    "Tally as shipped": "tally.as_shipped",
    "Fabric": "fabric.train",
    "Ignite": "ignite.train",
    "Accelerate": "accelerate.train",
    "TorchTNT": "torchtnt.train",
    "Lightning, everything off": "lightning.everything_off",
    "Lightning as shipped": "lightning.as_shipped",
    "Lightning, loss logged": "lightning.logging_the_loss",
}
"""By name, the file and the function in it."""


def contender(name: str) -> Contender:
    """Raises ImportError for one that is not installed. None is imported before: some change torch for all."""
    file, _, function = WHERE[name].partition(".")
    return getattr(import_module(f"{__name__}.{file}"), function)
