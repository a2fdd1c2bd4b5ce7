"""Terms: losses with weights of their own, which are counted before a window's first backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.loss import TOO_NARROW, Loss, check_terms
from engine.update.exchange import Exchange
from strategies import MicroBatch, Strategy

WeightsOf = Callable[[Any], Mapping[str, float]]
"""From a batch on the host to the weights of its terms, as `Task.weights`."""


class JoinedTerms:
    """Counts the terms of a window over all processes, and makes one loss of those of each micro-batch.

    That loss is (the sum of S_i x V / W_i) with the weight of the first term, whose total is V: divided by V it is the
    sum of S_i / W_i. A term with W_i = 0 is left out.
    """

    def __init__(self, exchange: Exchange, strategy: Strategy, weights_of: WeightsOf | None = None) -> None:
        self._exchange, self._strategy, self._weights_of = exchange, strategy, weights_of
        exchange.sends_at_start = False  # another message comes first
        self._names: set[str] = set()
        self._factors: dict[str, float] = {}
        self._first = ""

    def counted(self, micros: Iterable[MicroBatch], update: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a window, which wait on the host until the weights of all are known."""
        assert self._weights_of is not None
        held = [*micros]
        self.count([self._weights_of(micro.batch) for micro in held], update)
        held.reverse()
        while held:
            micro = held.pop()  # nothing else keeps its batch on the device
            micro.batch = self._strategy.to_device(micro.batch)
            yield micro

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
            may_lack_grad = not isinstance(weight, Tensor) and weight == 0
            if value.dtype in TOO_NARROW or not (value.requires_grad or may_lack_grad):
                what = f"term {name!r} is {value.dtype}, requires_grad={value.requires_grad}"
                raise UserError(f"{what}: expected float32 or wider, computed from the model. Or use self.log().")
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
