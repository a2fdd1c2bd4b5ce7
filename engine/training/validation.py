"""Validation: weighted means over data that the processes share, each sample counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.checks import check_stream
from engine.data.counting import size_problem
from engine.data.map_style import LoaderOptions, MapSource
from engine.data.sources import is_map_style
from engine.errors import UserError
from engine.loss import Loss
from engine.order import sequential
from engine.plan.schedule import Schedule, Stage
from engine.plan.windows import Plan
from engine.seeds import VALIDATION_STREAM, mix, seed_everything
from engine.settings import Settings
from engine.signals import Signals
from engine.task import Task
from engine.update.precision import autocast
from strategies import MicroBatch, Strategy


class Validation:
    """Evaluates a task on data, on the first `limit` samples of it if it is map-style."""

    def __init__(self, data: Any, task: Task, strategy: Strategy, settings: Settings, limit: int | None = None) -> None:
        self._task, self._strategy = task, strategy
        self._seed, self._precision = settings.seed, settings.precision
        self._stream: Iterable[Any] | None = None
        self.samples: int | None = None
        """The samples of map-style data."""
        if not is_map_style(data):
            check_stream(data, strategy)
            self._stream = data
            return
        self.samples = samples = len(data) if limit is None else min(len(data), limit)
        plan = Plan(samples, Schedule((Stage(0, 1, max(samples, 1)),)))
        options = LoaderOptions(settings.num_workers, settings.pin_memory, settings.persistent_workers)
        N, order = settings.micro_batch_size, sequential(samples)
        self._source = MapSource(data, order, plan, N, task, strategy, 0, options, collate="collate_validation")

    def run(self, model: nn.Module, signals: Signals | None = None) -> dict[str, float] | None:
        """Return each metric's mean over all processes; `model` is the unwrapped one: its forward has no collective.

        A metric's mean is (sum of its sums) / (sum of its weights); NaN if the weights sum to 0. Returns None on
        all processes if one of them was interrupted.
        """
        signals = signals or Signals()
        totals: dict[str, Tensor] = {}
        with self._evaluating(model, self._task.evaluate) as evaluate:
            for micro in self._micros():
                if signals.stop_requested and self._strategy.evaluates_alone:
                    break
                for name, metric in evaluate(micro.batch).items():
                    pair = self._pair(name, metric, micro)
                    totals[name] = totals[name] + pair if name in totals else pair
        totals_here = None if signals.stop_requested else {name: pair.tolist() for name, pair in totals.items()}
        everyone = self._strategy.gather(totals_here)
        if None in everyone:
            return None
        names = dict.fromkeys(name for row in everyone for name in row)
        if not names:
            raise UserError(
                "validation_data() or test_data() has no micro-batch, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts again."
            )
        means = {}
        for name in names:
            total, weight = (
                sum(column) for column in zip(*(row[name] for row in everyone if name in row), strict=True)
            )
            means[name] = total / weight if weight else float("nan")
        return means

    @contextmanager
    def _evaluating(
        self, model: nn.Module, compute: Callable[[nn.Module, Any], Any]
    ) -> Iterator[Callable[[Any], Mapping[str, Any]]]:
        """Yield a function of a batch: `compute` with the model in eval mode, {} if another process has the result."""
        strategy = self._strategy
        strategy.synchronize_buffers(model)
        seed_everything(mix(self._seed, VALIDATION_STREAM))
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad(), strategy.evaluation_context(model):
            yield partial(strategy.evaluate, autocast(compute, self._precision, strategy.device.type), model)
        for module, was_training in modes.items():
            module.training = was_training

    def _pair(self, name: str, metric: object, micro: MicroBatch) -> Tensor:
        """Return (sum, weight) in float64 on the device: no host-device sync before the end."""
        if isinstance(metric, Tensor) and metric.ndim == 0:
            if micro.size_problem:
                raise UserError(micro.size_problem)
            return torch.stack([metric.double() * micro.size, metric.new_full((), micro.size, dtype=torch.float64)])
        if isinstance(metric, Loss):
            return torch.stack([self._on_device(value) for value in metric])
        raise UserError(f"evaluate() returned {metric!r} for {name!r}: expected a 0-dim tensor, or Loss(sum, weight).")

    def _on_device(self, value: float | Tensor) -> Tensor:
        """Return `value` in float64 on the device, without the host-device sync of `torch.tensor`."""
        if isinstance(value, Tensor):
            return value.to(self._strategy.device, torch.float64, non_blocking=value.is_cpu)
        return torch.full((), float(value), dtype=torch.float64, device=self._strategy.device)

    def _micros(self) -> Iterator[MicroBatch]:
        if self._stream is None:
            for window in self._source.windows(0, 0, 0):
                yield from window
            return
        for index, batch in enumerate(self._stream):
            problem = size_problem(self._task, batch)
            size = 0 if problem else self._task.batch_size(batch)
            yield MicroBatch(self._strategy.to_device(batch), size, index, False, problem)
