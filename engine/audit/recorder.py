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
    bytes_once: int  # of the reductions that do not recur with each micro-batch


@contextmanager
def recorded(model: nn.Module, x: Tensor) -> Iterator[list[Step]]:
    """Record the steps of any optimizer in this process. `x` holds all samples, which are known by their first value.

    The gradient is taken when `step` uses it: after its closure, if it has one. Optimizers that step one after another
    make one update. A sample without a gradient (only looked at, or masked) counts if this process never trains it,
    since a loop may leave out a backward by mistake.
    """
    steps, seen, stepped = list[Step](), list[tuple[Rows, set[int]]](), list[Optimizer]()
    known, trained = {value: row for row, value in enumerate(x[:, 0].tolist())}, {-1}

    def on_forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            live = set[int]()
            output.register_hook(lambda gradient: live.update(gradient.nonzero()[:, 0].tolist()))  # type: ignore[no-untyped-call]
            seen.append((tuple(known.get(value, -1) for value in args[0][:, 0].tolist()), live))

    def keep(optimizer: Optimizer) -> None:
        traffic = calls.counts["collectives"], calls.counts["reduced_bytes"]
        held = {p: None for group in optimizer.param_groups for p in group["params"]}
        is_copy = not any(p in held for p in model.parameters())
        parameters: list[Tensor] = list(held if is_copy else model.parameters())
        gradients = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        same = [step for step in steps[-1:] if not seen and step.gradient.shape == gradients.shape]
        if same and optimizer not in stepped:  # one more of the same update
            is_held = _flat([torch.full_like(p, p in held) for p in parameters]) > 0
            steps[-1] = steps[-1]._replace(gradient=gradients.where(is_held, steps[-1].gradient))
        elif seen or any(p.grad is not None for p in held):  # a step without gradients changes nothing
            trained.update(rows[at] for rows, live in seen for at in live)
            kept = (tuple(row for at, row in enumerate(r) if at in live or row not in trained) for r, live in seen)
            micro_batches = list(filter(None, kept))
            once = sum(size * (number % max(len(micro_batches), 1)) for size, number in calls.sizes.items())
            steps.append(Step(_flat(parameters), gradients, micro_batches, *traffic, once))
            stepped.clear()
        stepped.append(optimizer)
        for counts in (seen, calls.counts, calls.sizes):
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
    alive = set[nn.Module]()  # as long as the process: freeing DDP may take forever
    nn.modules.module.register_module_forward_pre_hook(lambda module, _: alive.add(module))
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
