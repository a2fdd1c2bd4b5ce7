"""An exact loop in plain torch, and one deliberate fault in it at a time: what an audit must name, and in which case."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.audit import CASES

EVEN, SHORT, RAGGED, PADDED, ZERO, UNEVEN, SCHEDULE, RESUME, ANOTHER_P = CASES


def windows(job: Any, epoch: int, fault: str) -> list[list[Any]]:
    """This process's micro-batches by update."""
    K = job.schedule.get(epoch, job.K) if len(job.schedule) > 1 else job.K
    data = list(job.micro_batches)
    if fault == "samples seen twice":
        data[1] = data[0]
        data[K] = data[K + 1]
    elif fault == "samples never seen":
        data[2] = data[2][:1] + data[2][1:]
        data[2] = tuple(values[1:] for values in data[2])
    cut = [data[start : start + K] for start in range(0, len(data), K)]
    longest = torch.tensor(len(cut))
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return cut + [[]] * (int(longest) - len(cut))


def total(value: Tensor) -> Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value


def train(job: Any, fault: str = "") -> None:
    dist.init_process_group("gloo")
    model, P, K, rank = job.model, job.P, job.K, job.rank
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    first, done = 0, 0
    saved = Path(job.folder, "saved.pt")
    if job.resumes:
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        first = 0 if fault == "restarts the epoch" else state["done"]
    if fault == "replicas differ":
        params[0].data += rank
    for epoch in range(job.epochs):
        for window in windows(job, epoch, fault):
            done += 1
            if done <= first:
                continue
            is_tail = 0 < len(window) < K
            count = float(sum(batch[2].sum() for batch in window))
            W = total(torch.tensor(count, dtype=torch.float64)).item()
            if fault == "tail dropped" and is_tail:
                continue
            if fault == "crash on one process" and rank == 1:
                raise OSError("the disk is gone")
            if fault == "hang" and rank == 1:
                time.sleep(1000)
            if fault == "exits":
                os._exit(3 if rank == 1 else 0)
            for batch in window:
                loss = job.loss_sum(model, batch) / W
                means = job.loss(model, batch) / (len(window) * P)
                if fault == "factor K":
                    loss = loss * K
                elif fault == "factor P":
                    loss = loss * P
                elif fault == "factor 1/K":
                    loss = loss / K
                elif fault == "mean of means":
                    loss = means
                elif fault == "tail divided by K" and is_tail:
                    loss = means * len(window) / K
                elif fault == "only the last micro-batch":
                    optimizer.zero_grad()
                    loss = job.loss(model, batch) / (K * P)
                elif fault == "not reduced":
                    loss = job.loss_sum(model, batch) / count
                before = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in params]
                loss.backward()
                if fault == "reduced at each micro-batch":
                    for p, old in zip(params, before, strict=True):
                        p.grad = old + total(p.grad - old)
            for p in params:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                one_alone = fault == "one process keeps its own" and rank == 1
                reduces = fault not in ("not reduced", "reduced at each micro-batch")
                reduced = total(grad) if reduces else grad
                p.grad = grad if one_alone else reduced
            if fault == "tail carried into the next epoch" and is_tail:
                for p in params:
                    p.grad /= P  # the sum of what is reduced again
                    p.grad *= W / (W / (len(window) / K))
                continue
            if fault != "no gradients":
                optimizer.step()
            optimizer.zero_grad()
            if done == job.stop_after:
                if rank == 0:
                    torch.save({"model": model.state_dict(), "done": done}, saved)
                dist.barrier()
                return


NAMED = {
    "factor K": EVEN,
    "factor P": EVEN,
    "factor 1/K": EVEN,
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


def broken(fault: str) -> Callable[[Any], None]:
    return partial(train, fault=fault)
