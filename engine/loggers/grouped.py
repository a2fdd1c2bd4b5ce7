"""Records under grouped names, as tables and dashboards show them: `train/loss`, `optim/lr`, `data/samples`."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from engine.loggers.base import Logger, Start

# Names that records have, and their names here; any other is one of `train/`
GROUPED = {
    "loss": "train/loss",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "lr_factor": "optim/lr_factor",
    "skipped": "optim/skipped",
    "micro_batch_size": "window/micro_batch_size",
    "accumulate_grad_batches": "window/accumulate_grad_batches",
    "effective_batch": "window/effective_batch",
    "weight": "window/weight",
    "noise_scale": "window/noise_scale",
    "noise_scale_low": "window/noise_scale_low",
    "noise_scale_high": "window/noise_scale_high",
    "samples_per_second": "speed/samples_per_second",
    "epoch": "data/epoch",
    "samples": "data/samples",
}


class GroupedLogger(Logger):
    """A logger that writes numbers by update, with the samples and the weight (tokens) since the run's start."""

    def open(self, start: Start) -> None:
        """Start, or resume."""
        self._samples, self._weight = start.record.get("samples", 0), start.weight
        self._folder: Any = start.pinned or start.folder

    def log(self, record: Mapping[str, Any]) -> None:
        numbers = {name: float(value) if getattr(value, "ndim", 1) == 0 else value for name, value in record.items()}
        values = {_grouped(name): value for name, value in numbers.items() if name != "update"}
        is_update = "loss" in record
        if is_update:
            self._samples, self._weight = record["samples"], self._weight + record["weight"]
            rate, batch = record["samples_per_second"], record["effective_batch"]
            values["speed/weight_per_second"] = round(rate * record["weight"] / batch, 1) if batch else 0.0
        beside = {"data/samples": self._samples, "data/weight": self._weight}
        self.write(record["update"], {**beside, **values}, is_update)

    @abstractmethod
    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        """Write the numbers of an update, or of a validation after it."""


def _grouped(name: str) -> str:
    return GROUPED.get(name, name if "/" in name else f"train/{name}")
