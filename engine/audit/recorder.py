"""The recorder of a process in which a trainer trains: the samples, gradient and traffic of each `optimizer.step`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from engine.conformance.traffic import Calls

Rows = tuple[int, ...]


class Step(NamedTuple):
    """One `optimizer.step`: parameters before it, gradient, micro-batches and traffic since the last one."""

    parameters: Tensor
    gradient: Tensor
    micro_batches: list[Rows]
    collectives: int
    reduced_bytes: int


@contextmanager
def recorded(model: nn.Module, x: Tensor) -> Iterator[list[Step]]:
    """Record the steps of any optimizer in this process. `x` holds all samples, which are known by their first value.

    The gradient is taken when `step` uses it: after its closure, if it has one. A forward that no backward follows
    counts if it is the only one of its samples, since a loop may leave out a backward by mistake.
    """
    steps, seen, used = list[Step](), list[Rows](), set[int]()
    known = {value: row for row, value in enumerate(x[:, 0].tolist())}

    def on_forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            place = len(seen)
            output.register_hook(lambda _: used.add(place))  # type: ignore[no-untyped-call]
            seen.append(tuple(known.get(value, -1) for value in args[0][:, 0].tolist()))

    def keep(optimizer: Optimizer) -> None:
        traffic = calls.counts["collectives"], calls.counts["reduced_bytes"]
        parameters: list[Tensor] = list(model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p is held[0] for p in parameters):  # the trainer trains a copy
            parameters = held
        trained = {seen[place] for place in used}
        micro_batches = [rows for place, rows in enumerate(seen) if place in used or rows not in trained]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        steps.append(Step(_flat(parameters), _flat(gradients), micro_batches, *traffic))
        for counts in (seen, used, calls.counts):
            counts.clear()

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
            yield steps
    finally:
        handle.remove()


@torch.no_grad()
def _flat(tensors: list[Tensor]) -> Tensor:
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.double().flatten() for t in whole])
