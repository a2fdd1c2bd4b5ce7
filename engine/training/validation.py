"""Validation: weighted means over data that the processes share, each sample counted once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.checks import check_stream
from engine.data.counting import size_problem
from engine.data.map_style import MapSource
from engine.data.sources import is_map_style
from engine.data.window import Loading
from engine.errors import UserError
from engine.loss import Loss
from engine.order import sequential
from engine.plan.schedule import Schedule, Stage
from engine.plan.windows import Plan
from engine.seeds import ODD, SEED_BITS, VALIDATION_STREAM, mix, seed_everything
from engine.settings import Settings
from engine.signals import Signals
from engine.task import Logged, Task
from engine.training.merged_metrics import MergedMetrics
from engine.update.means import MeanSums
from engine.update.precision import autocast
from strategies import MicroBatch, Strategy


class Validation:
    """Evaluates a task on data: the first `limit` samples of a map-style one, in micro-batches of `N` (0: as set)."""

    def __init__(
        self, data: Any, task: Task, strategy: Strategy, settings: Settings, limit: int | None = None, N: int = 0
    ) -> None:
        self._task, self._strategy = task, strategy
        self._metrics = MergedMetrics(task.validation_metrics, strategy)
        self._logged: list[Logged] = []
        self._seed, self._precision = mix(settings.seed, VALIDATION_STREAM), settings.precision
        self._stream: Iterable[Any] | None = None
        self.samples: int | None = None  # the samples of map-style data
        if not is_map_style(data):
            check_stream(data, strategy)
            self._stream = data
            return
        self.samples = samples = len(data) if limit is None else min(len(data), limit)
        plan = Plan(samples, Schedule((Stage(0, 1, max(samples, 1)),)))
        workers = settings.num_workers, settings.pin_memory, settings.persistent_workers
        loading = Loading(task, strategy, 0, None, False, False, *workers)
        self._source = MapSource(data, sequential(samples), plan, N or settings.N, loading, "collate_validation")

    def cut(self, N: int) -> None:
        """Make micro-batches of N from now on."""
        if self._stream is None:
            self._source.cut(N)

    def run(self, model: nn.Module, signals: Signals | None = None) -> dict[str, float] | None:
        """Return each metric over all processes, of the unwrapped model; None on all if one was interrupted.

        A mean is (sum of its sums) / (sum of its weights), NaN if the weights sum to 0.
        """
        signals, task = signals or Signals(), self._task
        self._means, self._count, self._is_measured = MeanSums(self._strategy.device), 0, False
        self._metrics.reset()
        logged_before, task._log_entries = task._log_entries, self._logged
        with self._evaluating(model, self._measure) as evaluate:
            for micro in self._micros():
                if signals.stop_requested and self._strategy.evaluates_alone:
                    break
                self._micro = micro
                evaluate(micro.batch)
        task._log_entries = logged_before
        local = (self._count, self._means.read(), self._metrics.state(self._count), self._is_measured)
        everyone = self._strategy.collect(None if signals.stop_requested else local)
        found: dict[str, float] | None = None
        problem = ""
        if self._strategy.rank == 0:
            try:
                found = self._merged(everyone)
            except UserError as error:
                problem = str(error)
        found, problem = self._strategy.first((found, problem))
        if problem:
            raise UserError(problem)
        return found

    def _merged(self, everyone: list[Any]) -> dict[str, float] | None:
        """Return the metrics from the sums and states of all processes; None if one of them was interrupted."""
        if None in everyone:
            return None
        if not any(count for count, *_ in everyone):
            raise UserError(
                "validation_data() or test_data() has no micro-batch, on any process. "
                "Is it a generator, which can be read only once? Return an object whose __iter__ starts again."
            )
        means = {}
        for name in dict.fromkeys(name for _, pairs, *_ in everyone for name in pairs):
            known = [pairs[name] for _, pairs, *_ in everyone if name in pairs]
            total, weight = map(sum, zip(*known, strict=True))
            means[name] = total / weight if weight else float("nan")
        numbers = self._metrics.compute([state for _, _, state, _ in everyone])
        if not (means or numbers or any(row[-1] for row in everyone)) or means.keys() & numbers.keys():
            named = f"evaluate() gave {[*means]}, validation_metrics {[*numbers]}"
            raise UserError(f"{named}: expected at least one metric, each of another name. Use self.log(name, value).")
        return {**means, **numbers}

    def _measure(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """Add up what `evaluate` returns and logs; a pipeline comes to the end of this on its last process only."""
        self._logged.clear()
        found = self._task.evaluate(model, batch)
        self._is_measured |= found is not None  # perhaps elsewhere: in a callback
        returned = {} if found is None else found
        if not isinstance(returned, Mapping):
            raise UserError(f"evaluate() returned a {type(found).__name__}: expected a dictionary of metrics by name.")
        if twice := [name for name, _, _ in self._logged if name in returned]:
            raise UserError(f"evaluate() has both returned and logged {twice[0]!r}. Do one of them.")
        for name, metric in returned.items():
            if isinstance(metric, Loss):
                self._means.add(name, *metric)
            elif isinstance(metric, Tensor) and metric.ndim == 0:
                self._means.log([(name, metric, None)], self._micro)
            else:
                raise UserError(f"evaluate() returned {metric!r} for {name!r}: expected a 0-dim tensor or a Loss.")
        self._means.log(self._logged, self._micro)
        self._count += 1
        return {}

    @contextmanager
    def _evaluating(
        self, model: nn.Module, compute: Callable[[nn.Module, Any], Any]
    ) -> Iterator[Callable[[Any], Mapping[str, Any]]]:
        """Yield a function of a batch: `compute` with the model in eval mode, {} if another process has the result."""
        strategy = self._strategy
        strategy.synchronize_buffers(model)
        seed_everything(self._seed)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad(), strategy.evaluation_context(model):
            yield partial(strategy.evaluate, autocast(compute, self._precision, strategy.device.type), model)
        for module, was_training in modes.items():
            module.training = was_training

    def _micros(self) -> Iterator[MicroBatch]:
        """Yield each micro-batch when torch's generators are seeded by its place in the data."""
        for micro in chain.from_iterable(self._source.windows(0, 0, 0)) if self._stream is None else self._read():
            self._strategy.seed(self._seed + micro.seed_index * ODD & SEED_BITS)
            yield micro

    def _read(self) -> Iterator[MicroBatch]:
        assert self._stream is not None
        for index, batch in enumerate(self._stream):
            problem = size_problem(self._task, batch)
            size = 0 if problem else self._task.batch_size(batch)
            yield MicroBatch(self._strategy.to_device(batch), size, index, False, problem)
