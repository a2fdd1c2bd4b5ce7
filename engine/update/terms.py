"""Terms: losses with weights of their own, which are counted before a window's first backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from engine.data.window import Source, Window
from engine.errors import UserError
from engine.loss import Loss, check_terms
from engine.update.exchange import Exchange
from strategies import MicroBatch, Strategy

WeightsOf = Callable[[Any], Mapping[str, float]]
"""From a batch on the host to the weights of its terms, as `Task.weights`."""


class JoinedTerms:
    """Counts the terms of a window over all processes, and makes one loss of those of each micro-batch.

    That loss is (the sum of S_i x V / W_i) with the weight of the first term, whose total is V: divided by V it is the
    sum of S_i / W_i. A term with W_i = 0 is left out.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        exchange.sends_at_start = False  # another message comes first
        self._names: set[str] = set()
        self._factors: dict[str, float] = {}
        self._first = ""

    def count(self, weights: Sequence[Mapping[str, Any]], update: int) -> None:
        """Exchange the weights of this process's micro-batches. Raises UserError for invalid ones, on all processes."""
        for own in weights:
            self._names = self._names or set(own)
            if not own or own.keys() != self._names:
                raise UserError(
                    f"weights() returned the terms {sorted(own)}: expected {sorted(self._names) or 'at least one'}. "
                    "Return the same for each micro-batch, with weight 0 for what is missing."
                )
            for name, weight in own.items():
                if not isinstance(weight, Real | Tensor) or not 0 <= float(weight) < math.inf:
                    raise UserError(f"weights() gave {name!r} {weight}: expected a finite number of at least 0.")
        local = {name: math.fsum(float(own[name]) for own in weights) for name in (weights[0] if weights else ())}
        totals = self._exchange.count(local, len(weights), update)
        self._first = next((name for name, total in totals.items() if total), next(iter(totals), ""))
        self._factors = {name: total and totals[self._first] / total for name, total in totals.items()}

    def joined(self, terms: Any) -> Loss:
        """Return the terms of a micro-batch as one loss, and record each of them. Raises UserError for invalid ones."""
        parts = []
        for name, (value, weight) in check_terms(terms, {*self._factors}).items():
            if not value.requires_grad and (isinstance(weight, Tensor) or weight):
                raise UserError(f"term {name!r} does not require grad. Compute it from the model, or use self.log().")
            self._exchange.means.add(name, value.detach(), weight)
            factor = self._factors[name]
            parts.append(value * factor if factor else LeftOut.apply(value))  # type: ignore[no-untyped-call]
        return Loss(sum(parts[1:], parts[0]), terms[self._first].weight)


class LeftOut(torch.autograd.Function):
    """Zero, with no gradient at all: one of zero would be NaN where the graph divides by 0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


class CountedSource:
    """A source whose windows are counted before their first micro-batch; it leaves batches on the host."""

    def __init__(self, source: Source, weights_of: WeightsOf, terms: JoinedTerms, strategy: Strategy) -> None:
        self._source, self._parts = source, (weights_of, terms, strategy)

    def windows(
        self, epoch: int, update: int, samples: int, positions: Sequence[Any] | None = None
    ) -> Iterator[Window]:
        """Yield the windows of `epoch`, as the source does."""
        for number, window in enumerate(self._source.windows(epoch, update, samples, positions), update):
            yield CountedWindow(window, number, *self._parts)


class CountedWindow:
    """A window whose micro-batches wait on the host until the weights of all processes are known."""

    def __init__(self, window: Window, update: int, *parts: Any) -> None:
        self._window, self._update, self._parts = window, update, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._window, name)

    def __iter__(self) -> Iterator[MicroBatch]:
        weights_of, terms, strategy = self._parts
        micros = [*self._window]
        terms.count([weights_of(micro.batch) for micro in micros], self._update)
        micros.reverse()
        while micros:
            micro = micros.pop()  # nothing else keeps its batch on the device
            micro.batch = strategy.to_device(micro.batch)
            yield micro
