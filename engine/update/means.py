"""Weighted means of what a task logs: sums over a window or a validation, on the device."""

import math
from collections.abc import Iterable
from numbers import Real

import numpy
import torch
from torch import Tensor

from engine.errors import UserError
from engine.task import Logged
from strategies import MicroBatch

Number = float | Tensor
Pair = tuple[float, float]  # a sum and its weight


class MeanSums:
    """Adds up (sum, weight) by name, in float64; the host-device sync is in `read`, once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.by_name: dict[str, tuple[Number, Number]] = {}

    def log(self, entries: Iterable[Logged], micro: MicroBatch) -> None:
        """Add what was logged. Raises UserError if it is invalid; a bad weight on the device makes the mean NaN."""
        for name, value, weight in entries:
            if weight is None and micro.size_problem:
                raise UserError(f"self.log({name!r}, ...): {micro.size_problem} Or give log() a weight.")
            mean, count = self._wide(name, value), self._wide(name, micro.size if weight is None else weight)
            if isinstance(count, Tensor):
                self.add(name, torch.where(count > 0, mean * count, 0 * count.sqrt()), count)
            else:
                self.add(name, mean * count if count else 0.0, count)

    def add(self, name: str, total: Number, weight: Number) -> None:
        """Add a sum and its weight. Raises UserError for an invalid name, sum or weight."""
        total, weight = self._wide(name, total), self._wide(name, weight)
        if not isinstance(weight, Tensor) and not 0 <= weight < math.inf:
            raise UserError(f"self.log({name!r}, weight={weight}): expected a finite number of at least 0.")
        if (before := self.by_name.get(name)) is not None:
            total, weight = before[0] + total, before[1] + weight
        elif not (isinstance(name, str) and name.isprintable()):
            raise UserError(f"self.log({name!r}, ...): expected a name of printable characters.")
        self.by_name[name] = total, weight

    def read(self) -> dict[str, Pair]:
        """Return (sum, weight) by name, by one copy from the device."""
        numbers = [number for pair in self.by_name.values() for number in pair]
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        copied = iter(torch.stack(tensors).tolist() if tensors else ())
        read = [next(copied) if isinstance(number, Tensor) else number for number in numbers]
        return dict(zip(self.by_name, zip(read[::2], read[1::2], strict=True), strict=True))

    def _wide(self, name: str, value: Number) -> Number:
        """Return `value` in float64, and a tensor on the device, without a host-device sync."""
        if isinstance(value, Tensor) and value.ndim == 0:
            return value.detach().to(self._device, torch.float64, non_blocking=value.is_cpu)
        if isinstance(value, Real | numpy.bool_):
            return float(value)
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"self.log({name!r}, ...) was given {kind}: expected a number or a 0-dim tensor.")
