"""Records under grouped names, as tables and dashboards show them: `train/loss`, `optim/lr`, `data/samples`."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from engine.loggers.base import Logger, Start

NOISE = ["noise_scale", "noise_scale_low", "noise_scale_high"]
# Names that records have, by group; any other is one of `train/`
GROUPS = {
    "train": ["loss"],
    "optim": ["grad_norm", "lr", "lr_factor", "skipped"],
    "window": ["micro_batch_size", "accumulate_grad_batches", "effective_batch", "weight", *NOISE],
    "speed": ["samples_per_second"],
    "data": ["epoch", "samples"],
}
GROUPED = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


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
