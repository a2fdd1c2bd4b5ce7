"""The summary of a finished run: summary.json."""

import platform
from typing import Any

import torch

from engine.state import RunState
from engine.update.timing import ReductionCost
from engine.version import __version__
from strategies import Strategy


def summarize(state: RunState, strategy: Strategy, cost: ReductionCost | None) -> dict[str, Any]:
    """Return the content of summary.json: final metrics, counts, collectives and bytes, versions."""
    reductions, size = strategy.reductions()
    return {
        **{f"validation/{name}": mean for name, mean in state.metrics.items()},
        "loss": state.record.get("loss"),
        "updates": state.update,
        "skipped": state.skipped,
        "epoch": state.epoch,
        "samples": state.samples,
        "seconds": round(state.seconds, 3),
        "processes": strategy.processes,
        "strategy": strategy.describe(),
        "all_reduces_per_update": reductions,
        "bytes_reduced_per_update": size,
        "reduction": cost.summary() if cost is not None else None,
        "versions": {"tally": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
