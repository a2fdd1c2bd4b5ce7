"""Validation: weighted means over data that is shared between the processes, each sample counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.checks import check_stream
from engine.data.map_style import LoaderOptions, MapSource
from engine.data.sources import is_map_style
from engine.loss import Loss
from engine.order import mix, sequential
from engine.plan.schedule import Schedule, Stage
from engine.plan.windows import Plan
from engine.seeds import VALIDATION_STREAM, seed_everything
from engine.signals import Interrupts
from engine.task import Task
from engine.update.precision import autocast
from strategies import Strategy


class Evaluation:
    """Evaluates a task on its validation data, `max_samples` of it if given (map-style data only)."""

    def __init__(
        self,
        data: Any,
        task: Task,
        strategy: Strategy,
        N: int,
        options: LoaderOptions,
        precision: str | None = None,
        max_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self._task = task
        self._seed = seed
        self._strategy = strategy
        self._evaluate = autocast(task.evaluate, precision, strategy.device.type)
        self._stream: Iterable[Any] | None = None
        if not is_map_style(data):
            check_stream(data, strategy)
            self._stream = data
            return
        samples = len(data) if max_samples is None else min(len(data), max_samples)
        plan = Plan(samples, Schedule((Stage(0, 1, max(samples, 1)),)))
        self._source = MapSource(data, sequential(samples), plan, N, task, strategy, 0, options)

    def run(self, model: nn.Module, interrupts: Interrupts | None = None) -> dict[str, float] | None:
        """Return each metric's mean over all processes; `model` is the unwrapped one: its forward has no collective.

        A metric's mean is (sum of its sums) / (sum of its weights); NaN where the weights sum to 0. None on all
        processes where one of them was interrupted.
        """
        interrupts = interrupts or Interrupts()
        self._strategy.synchronize_buffers(model)
        seed_everything(mix(self._seed, VALIDATION_STREAM))
        totals: dict[str, Tensor] = {}
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad(), self._strategy.evaluation_context(model):
            for batch, size in self._batches():
                if interrupts.requested and self._strategy.evaluates_alone:
                    break
                for name, metric in self._strategy.evaluate(self._evaluate, model, batch).items():
                    pair = self._pair(name, metric, size)
                    totals[name] = totals[name] + pair if name in totals else pair
        for module, was_training in modes.items():
            module.training = was_training
        mine = None if interrupts.requested else {name: pair.tolist() for name, pair in totals.items()}
        everyone = self._strategy.gather(mine)
        if None in everyone:
            return None
        names = dict.fromkeys(name for row in everyone for name in row)
        if not names:
            raise ValueError(
                "validation_data() has no micro-batch, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts anew."
            )
        means = {}
        for name in names:
            total, weight = (
                sum(column) for column in zip(*(row[name] for row in everyone if name in row), strict=True)
            )
            means[name] = total / weight if weight else float("nan")
        return means

    def _pair(self, name: str, metric: object, size: int) -> Tensor:
        """(sum, weight) in float64 on the device: no look at it before the end."""
        if isinstance(metric, Tensor) and metric.ndim == 0:
            return torch.stack([metric.double() * size, metric.new_full((), size, dtype=torch.float64)])
        if isinstance(metric, Loss):
            return torch.stack([self._on_device(value) for value in metric])
        raise ValueError(f"evaluate() returned {metric!r} for {name!r}: return a 0-dim tensor, or Loss(sum, weight).")

    def _on_device(self, value: float | Tensor) -> Tensor:
        """`value` in float64; the host does not wait until it is there, as `torch.tensor` would."""
        if isinstance(value, Tensor):
            return value.to(self._strategy.device, torch.float64, non_blocking=value.is_cpu)
        return torch.full((), value, dtype=torch.float64, device=self._strategy.device)

    def _batches(self) -> Iterator[tuple[Any, int]]:
        if self._stream is not None:
            for batch in self._stream:
                yield self._strategy.to_device(batch), self._task.batch_size(batch)
        else:
            for window in self._source.windows(0, 0, 0):
                for micro in window:
                    yield micro.batch, micro.size
