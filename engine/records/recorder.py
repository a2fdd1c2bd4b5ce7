"""Records, one per update and one per validation, for the loggers; and the summary of a run."""

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.loggers.base import Logger
from engine.state import RunState
from engine.update.message import Outcome
from engine.update.timing import ReductionCost
from engine.version import __version__
from strategies import Strategy


class Recorder:
    """Makes records and gives them to the loggers, which are on process 0 only. `samples` are those so far."""

    def __init__(self, loggers: Sequence[Logger], samples: int = 0) -> None:
        self._loggers, self._samples = loggers, samples
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Measure throughput from now on: the time before was not training."""
        self._since = time.perf_counter()

    def record(self, counts: Mapping[str, float], outcome: Outcome, lr: float, K: int) -> dict[str, Any]:
        """Return the record of an update; `counts` are those after it."""
        now, samples = time.perf_counter(), int(counts["samples"])
        rate = (samples - self._samples) / (now - self._since)
        self._since, self._samples = now, samples
        return {
            **counts,
            "weight": outcome.weight,
            "loss": outcome.loss,
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "accumulate_grad_batches": K,
            "effective_batch": outcome.samples,
            "samples_per_second": int(rate) if rate > 100 else round(rate, 3),
            **outcome.metrics,
        }

    def log_validation(self, update: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the results of a validation."""
        self.log({"update": update, "epoch": epoch, **{f"validation/{name}": mean for name, mean in metrics.items()}})

    def close(self) -> None:
        """Close the loggers: the run is over."""
        for logger in reversed(self._loggers):  # the folder last: others write into it
            logger.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Give a record to the loggers."""
        for logger in self._loggers:
            logger.log(record)


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
