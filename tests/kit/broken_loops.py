"""An exact loop in plain torch, and deliberate faults in it: what an audit must name, and in which case."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.audit import CASES

EVEN, SHORT, RAGGED, *_ = CASES
NAMED = {
    "factor K": EVEN,
    "factor P": EVEN,
    "factor 1/K": EVEN,
    "factor 1/P": EVEN,
    "only the last micro-batch": EVEN,
    "mean of means": RAGGED,
    "tail divided by K": SHORT,
    "tail dropped": SHORT,
    "tail carried into the next epoch": SHORT,
    "not reduced": EVEN,
    "reduced at each micro-batch": EVEN,
    "samples seen twice": EVEN,
    "samples never seen": EVEN,
    "replicas differ": EVEN,
    "hang": EVEN,
    "crash on one process": EVEN,
}
"""Each fault that has a name, and a case that shows it."""


def broken(*faults: str) -> Callable[[Any], None]:
    """Return the loop with these faults."""
    return partial(train, faults=frozenset(faults))


def total(value: Tensor) -> Tensor:
    """Return the sum over processes."""
    value = value.clone()
    dist.all_reduce(value)
    return value


def windows(job: Any, epoch: int, faults: frozenset[str]) -> list[list[Any]]:
    """Return this process's micro-batches by update, as many updates on each process."""
    K = job.schedule.get(epoch, job.K)
    data = job.micro_batches
    if "samples seen twice" in faults:
        data.append(data[0])
    if "samples never seen" in faults:
        data[2] = tuple(values[1:] for values in data[2])
    cut = [data[start : start + K] for start in range(0, len(data), K)]
    longest = torch.tensor(len(cut))
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return cut + [[]] * (int(longest) - len(cut))


def loss_of(job: Any, batch: Any, window: list[Any], W: float, faults: frozenset[str]) -> Tensor:
    """Return what `backward` takes: without a fault, this micro-batch's part of the mean over all processes."""
    parts, is_tail = len(window), len(window) < job.K
    loss = job.loss_sum(job.model, batch) / W
    if "mean of means" in faults or ("tail divided by K" in faults and is_tail):
        loss = job.loss(job.model, batch) / (parts * job.P)
    if "only the last micro-batch" in faults:
        loss = job.loss(job.model, batch) / (parts * job.P)
    factors = {
        "factor K": job.K,
        "factor P": job.P,
        "factor 1/K": 1 / job.K,
        "factor 1/P": 1 / job.P,
        "float32 rounding": torch.tensor(1 / 3).item() * 3,
        "not reduced": job.P,
        "tail divided by K": parts / job.K,
        "tail carried into the next epoch": parts / job.K,
    }
    for fault in faults & factors.keys():
        loss = loss * factors[fault]
    return loss


def train(job: Any, faults: frozenset[str] = frozenset()) -> None:
    dist.init_process_group("gloo")
    model = job.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved, done, first = Path(job.folder, "saved.pt"), 0, 0
    if job.resumes:
        first, state = torch.load(saved)
        model.load_state_dict(state)
    parameters = list(model.parameters())
    if "replicas differ" in faults:
        parameters[0].data += job.rank
    carried: list[Tensor] = []
    reduces_each = "reduced at each micro-batch" in faults
    for epoch in range(job.epochs):
        local = [torch.zeros_like(p) for p in parameters]  # of this window
        for window in windows(job, epoch, faults):
            done += 1
            if done <= first:
                continue
            if job.rank == 1 and "crash on one process" in faults:
                raise OSError("the disk is gone")
            if job.rank == 1 and "hang" in faults:
                time.sleep(1000)
            W = total(sum((batch[2].sum() for batch in window), torch.zeros(()))).item()
            is_tail = len(window) < job.K and len(job.schedule) == 1
            if is_tail and "tail dropped" in faults:
                continue
            for batch in window:
                if "only the last micro-batch" in faults:
                    local = [torch.zeros_like(p) for p in parameters]
                gradients = torch.autograd.grad(loss_of(job, batch, window, W, faults), parameters)
                for old, gradient in zip(local, gradients, strict=True):
                    old += total(gradient) if reduces_each else gradient
            if is_tail and "tail carried into the next epoch" in faults:
                carried = local
                continue
            if carried:
                local, carried = [a + b for a, b in zip(local, carried, strict=True)], []
            for parameter, gradient in zip(parameters, local, strict=True):
                is_local = reduces_each or "not reduced" in faults
                reduced = gradient if is_local else total(gradient)
                keeps_own = job.rank == 1 and "one process keeps its own gradient" in faults
                parameter.grad = gradient if keeps_own else reduced
            optimizer.step()
            local = [torch.zeros_like(p) for p in parameters]
            if done == job.stop_after:
                torch.save((done, model.state_dict()), saved) if job.rank == 0 else None
                dist.barrier()
                return
