"""What is left to say when a run is over."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engine.trainer import Trainer


def summarize(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """Return the content of summary.json: final metrics, what was done, what crossed the wire, versions."""
    reductions, size = trainer.strategy.reductions()
    meter = trainer.loop.meter
    costs = meter.costs if meter is not None else None
    return {
        **{f"validation/{name}": mean for name, mean in trainer.metrics.items()},
        "loss": trainer.record.get("loss"),
        "updates": trainer.update,
        "skipped": trainer.skipped,
        "epoch": trainer.epoch,
        "samples": trainer.samples,
        "seconds": round(seconds, 3),
        "processes": trainer.strategy.processes,
        "strategy": trainer.strategy.describe(),
        "all_reduces_per_update": reductions,
        "bytes_reduced_per_update": size,
        "reduction": costs.summary() if costs is not None else None,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
