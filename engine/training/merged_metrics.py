"""Validation metrics that are not means (AUROC, F1): each process updates its own, and process 0 merges them."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from engine.errors import UserError, describe
from strategies import Strategy

log = logging.getLogger("tally")

MOST_NUMBERS = 1000  # of one metric; a curve has more, and is not recorded


class MergedMetrics:
    """The `validation_metrics` of a task over all processes. Raises UserError for one that cannot be merged."""

    def __init__(self, metrics: Mapping[str, Any], strategy: Strategy) -> None:
        self._metrics, self._strategy = metrics, strategy
        for name, metric in metrics.items():
            what = f"validation_metrics[{name!r}] is a {type(metric).__name__}"
            if not all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")):
                raise UserError(f"{what}: expected an object with update, compute and reset.")
            if strategy.processes > 1:
                try:
                    metric.reset()
                    self._loaded(_saved(metric)).merge_state(self._loaded(_saved(metric)))
                except Exception as error:
                    raise UserError(
                        f"{what}, which cannot be gathered from {strategy.processes} processes: expected an object "
                        f"that can be pickled, with merge_state(other). Give its class one. ({describe(error)})"
                    ) from error

    def reset(self) -> None:
        """Forget all samples, and move to the device."""
        for metric in self._metrics.values():
            metric.reset()
            if hasattr(metric, "to"):
                metric.to(self._strategy.device)
            for part in getattr(metric, "modules", tuple)():
                part.distributed_available_fn = bool  # False: or compute() of torchmetrics would wait for all processes

    def state(self, count: int) -> dict[str, bytes]:
        """Return what process 0 needs of this process after `count` micro-batches."""
        is_needed = self._strategy.rank != 0 and count > 0
        return {name: _saved(metric) for name, metric in self._metrics.items() if is_needed}

    def compute(self, states: Sequence[Mapping[str, bytes]]) -> dict[str, float]:
        """Return all numbers on process 0, by name and place: `confusion/0/1`. Raises UserError if a metric fails."""
        numbers: dict[str, float] = {}
        for name, metric in self._metrics.items():
            try:
                for state in states:
                    if name in state:
                        metric.merge_state(self._loaded(state[name]))
                found = dict(islice(_numbers(name, metric.compute()), MOST_NUMBERS + 1))
            except Exception as error:
                raise UserError(f"validation_metrics[{name!r}] failed: {describe(error)}.") from error
            if len(found) > MOST_NUMBERS:
                log.warning("%s has more than %d numbers, and is not recorded.", name, MOST_NUMBERS)
            else:
                numbers |= found
        return numbers

    def _loaded(self, state: bytes) -> Any:
        return torch.load(io.BytesIO(state), map_location=self._strategy.device, weights_only=False)


def _saved(metric: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(metric, buffer)
    return buffer.getvalue()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for place, part in value.items():
            yield from _numbers(f"{name}/{place}", part)
    else:
        yield name, float(value)
