"""What a process records while a trainer trains: the samples, gradient and traffic of each `optimizer.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from engine.audit.cases import Rows
from engine.conformance.traffic import Calls


@dataclass
class Step:
    """One `optimizer.step`: parameters before it, gradient, micro-batches and traffic since the last one."""

    parameters: Tensor
    gradient: Tensor
    micro_batches: list[Rows]
    collectives: int
    reduced_bytes: int


@dataclass
class Log:
    """The steps of one process, and whether its samples came from the dataset."""

    steps: list[Step] = field(default_factory=list)
    from_dataset: bool = False


@contextmanager
def recorded(model: nn.Module, x: Tensor) -> Iterator[Log]:
    """Record the steps of any optimizer in this process. `x` holds all samples, which are known by their first value.

    The gradient is taken when `step` uses it: after its closure, if it has one. A forward that no backward follows
    counts if it is the only one of its samples, since a loop may leave out a backward by mistake.
    """
    log, seen, used = Log(), list[Rows](), set[int]()
    known = {value: row for row, value in enumerate(x[:, 0].tolist())}

    def on_forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            place = len(seen)
            output.register_hook(lambda _: used.add(place))
            seen.append(tuple(known.get(value, -1) for value in args[0][:, 0].tolist()))

    def keep(optimizer: Optimizer) -> None:
        counts = dict(calls.counts)
        parameters = list(model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p is held[0] for p in parameters):  # the trainer trains a copy
            parameters = held
        with torch.no_grad():
            values, gradients = _flat(parameters), _flat([_gradient(p) for p in parameters])
        trained = {seen[place] for place in used}
        micro_batches = [rows for place, rows in enumerate(seen) if place in used or rows not in trained]
        traffic = counts.get("collectives", 0), counts.get("reduced_bytes", 0)
        log.steps.append(Step(values, gradients, micro_batches, *traffic))
        seen.clear()
        used.clear()
        calls.counts.clear()

    def on_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return keep(optimizer)

        def with_record() -> Any:
            loss = closure()
            keep(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": with_record}

    model.register_forward_hook(on_forward)
    handle = register_optimizer_step_pre_hook(on_step)
    try:
        with Calls() as calls:
            yield log
    finally:
        handle.remove()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flat(tensors: list[Tensor]) -> Tensor:
    whole: Callable[[Tensor], Tensor] = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    return torch.cat([whole(t).detach().double().flatten() for t in tensors])
