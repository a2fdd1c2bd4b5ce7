"""Terms: losses with weights of their own, which are counted before a window's first backward."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.loss import TOO_NARROW, Loss, check_terms
from engine.memory import is_out_of_memory
from engine.update.exchange import Exchange
from strategies import MicroBatch, Strategy

Weights = Mapping[str, float]
WeightsOf = Callable[[Any], Weights]  # from a batch on the host to the weights of its terms, as `Task.weights`


class JoinedTerms:
    """Counts the terms of a window over all processes, and makes one loss of those of each micro-batch.

    It has the weight of the first term, whose total is V: the sum of S_i x V / W_i, divided by V, is that of S_i / W_i.
    """

    def __init__(self, exchange: Exchange, strategy: Strategy, weights_of: WeightsOf | None = None) -> None:
        self._exchange, self._strategy, self._weights_of = exchange, strategy, weights_of
        exchange.sends_at_start = False  # another message comes first
        self._names: list[str] = []
        self._factors: dict[str, float] = {}
        self._first = ""

    def counted(self, micros: Iterable[MicroBatch], update: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a window, which wait on the host until the weights of all are known."""
        assert self._weights_of is not None
        held, weights, problem = list[MicroBatch](), list[Weights](), None
        try:
            held += micros
            weights += (self._weights_of(micro.batch) for micro in held)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = error  # the others count: the next message tells them
        self.count([] if problem else weights, update)
        if problem is not None:
            raise problem
        for micro in held:
            micro.batch = self._strategy.to_device(micro.batch)
            yield micro
            micro.batch = None  # what was used does not stay on the device

    def count(self, weights: Sequence[Mapping[str, Any]], update: int) -> None:
        """Exchange the weights of this process's micro-batches. Raises UserError for invalid ones."""
        for own in weights:
            self._names = self._names or [*own]
            valid = (isinstance(weight, Real | Tensor) and 0 <= float(weight) < math.inf for weight in own.values())
            if not own or own.keys() != {*self._names} or not all(valid):
                raise UserError(
                    f"weights() returned {dict(own)}: expected finite numbers of at least 0 for the terms "
                    f"{self._names}. Return the same terms for each micro-batch, with 0 for what is missing."
                )
        local = {name: math.fsum(float(own[name]) for own in weights) for name in self._names if weights}
        totals = self._exchange.count(local, len(weights), update)
        self._first = next((name for name, total in totals.items() if total), next(iter(totals), ""))
        self._factors = {name: total and totals[self._first] / total for name, total in totals.items()}

    def joined(self, terms: Any) -> Loss:
        """Return the terms of a micro-batch as one loss, and record each of them. Raises UserError for invalid ones."""
        parts = []
        for name, (value, weight) in check_terms(terms, {*self._factors}).items():
            needs_grad = isinstance(weight, Tensor) or weight != 0
            if value.dtype in TOO_NARROW or value.requires_grad < needs_grad:
                what = f"term {name!r} is {value.dtype}, requires_grad={value.requires_grad}"
                raise UserError(f"{what}: expected float32 or wider, computed from the model. Or use self.log().")
            self._exchange.means.add(name, value.detach(), weight)
            parts.append(value * factor if (factor := self._factors[name]) else LeftOut.apply(value))
        return Loss(sum(parts[1:], parts[0]), terms[self._first].weight)


class LeftOut(torch.autograd.Function):
    """Zero, with no gradient at all: one of zero would be NaN where the graph divides by 0."""

    apply: Callable[[Tensor], Tensor]

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None
