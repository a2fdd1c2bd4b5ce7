"""Loops of unusual shapes, exact or broken, written without knowledge of the audit: it may name none wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.audit import CASES
from tests.kit.broken_loops import total, windows

EVEN, SHORT, RAGGED, PADDED, _, UNEVEN, _, RESUME, _ = CASES
NOT_NAMED = "not exact, not named"
Loop = Callable[[Any], None]
VARIANTS: dict[str, tuple[Loop, str, str]] = {}
"""By name: the loop, the case that it is tried in, and the verdict that is true of it."""


def variant(case: str, verdict: str) -> Callable[[Loop], Loop]:
    """Register a loop under its name."""

    def add(loop: Loop) -> Loop:
        VARIANTS[loop.__name__] = loop, case, verdict
        return loop

    return add


def start(job: Any) -> tuple[list[Any], torch.optim.Optimizer]:
    """Return the model's parameters, and an optimizer that holds them."""
    dist.init_process_group("gloo")
    parameters = list(job.model.parameters())
    return parameters, torch.optim.SGD(parameters, lr=0.05)


def epochs(job: Any) -> Iterator[tuple[list[Any], float]]:
    """Yield each window with its weight over all processes."""
    for epoch in range(job.epochs):
        for window in windows(job, epoch, frozenset()):
            yield window, weight(window)


def weight(window: list[Any]) -> float:
    """Return the window's weight over all processes."""
    return total(sum((batch[2].sum() for batch in window), torch.zeros(())).double()).item()


def backward(job: Any, window: list[Any], W: float) -> None:
    """Add the gradient of the window's losses over W."""
    for batch in window:
        (job.loss_sum(job.model, batch) / W).backward()


def reduce(parameters: list[Any]) -> None:
    """Sum the gradients over processes."""
    for p in parameters:
        p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad)


def update(parameters: list[Any], *optimizers: torch.optim.Optimizer) -> None:
    """Reduce, step and clear."""
    reduce(parameters)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


@variant(EVEN, "exact")
def two_optimizers(job: Any) -> None:
    parameters, _ = start(job)
    optimizers = [torch.optim.SGD(parameters[:1], lr=0.05), torch.optim.Adam(parameters[1:])]
    for window, W in epochs(job):
        backward(job, window, W)
        update(parameters, *optimizers)


@variant(EVEN, NOT_NAMED)
def two_optimizers_of_which_one_is_k_too_large(job: Any) -> None:
    parameters, _ = start(job)
    optimizers = [torch.optim.SGD(own, lr=0.05) for own in (parameters[:1], parameters[1:])]

    def scale(*_: Any) -> None:
        for p in parameters[1:]:
            p.grad *= job.K

    optimizers[0].register_step_post_hook(scale)
    for window, W in epochs(job):
        backward(job, window, W)
        update(parameters, *optimizers)


@variant(PADDED, "exact")
def optimizers_that_step_in_the_last_backward(job: Any) -> None:
    parameters, _ = start(job)
    own = {p: torch.optim.SGD([p], lr=0.05) for p in parameters}
    is_last = [False]
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: update([p], own[p]) if is_last[0] else None)
    for window, W in epochs(job):
        for batch in window:
            is_last[0] = batch is window[-1]
            backward(job, [batch], W)


@variant(PADDED, "exact")
def a_second_try(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        backward(job, window[:-1], W)  # and then it fails
        optimizer.zero_grad()
        backward(job, window, W)
        update(parameters, optimizer)


@variant(PADDED, "exact")
def two_passes_of_each(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        backward(job, [batch for batch in window for _ in range(2)], 2 * W)
        update(parameters, optimizer)


@variant(EVEN, NOT_NAMED)
def two_passes_not_halved(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        backward(job, [*window, *window], W)
        update(parameters, optimizer)


@variant(EVEN, "samples seen twice")
def the_first_twice(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, _ in epochs(job):
        backward(job, [window[0], *window], weight([window[0], *window]))
        update(parameters, optimizer)


@variant(UNEVEN, "exact")
def masked_copies_for_what_is_missing(job: Any) -> None:
    parameters, optimizer = start(job)
    x, y, ones = job.micro_batches[0]
    for window, W in epochs(job):
        fill = [(x, y, 0 * ones)] * (job.K - len(window))
        backward(job, [*window, *fill], W)
        update(parameters, optimizer)


@variant(UNEVEN, "exact")
def zeros_for_what_is_missing(job: Any) -> None:
    parameters, optimizer = start(job)
    zeros = [0 * values for values in job.micro_batches[0]]
    for window, W in epochs(job):
        backward(job, [*window, *[zeros] * (job.K - len(window))], W)
        update(parameters, optimizer)


@variant(RAGGED, "exact")
def micro_batches_filled_up(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        filled = [[torch.cat([v, v[: job.N - len(v)] * (v is not batch[2])]) for v in batch] for batch in window]
        backward(job, filled, W)
        update(parameters, optimizer)


@variant(EVEN, "exact")
def logs_reduced_at_each_micro_batch(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        for batch in window:
            backward(job, [batch], W)
            for size in [1] * 20 + [70, 200]:
                total(torch.zeros(size))
        update(parameters, optimizer)


@variant(PADDED, "exact")
def hooks_that_keep_the_gradients(job: Any) -> None:
    parameters, optimizer = start(job)
    kept = {p: torch.zeros_like(p) for p in parameters}

    def keep(p: Any) -> None:
        kept[p] += p.grad
        p.grad = None

    for p in parameters:
        p.register_post_accumulate_grad_hook(keep)
    for window, W in epochs(job):
        backward(job, window, W)
        for p in parameters:
            p.grad, kept[p] = kept[p], torch.zeros_like(p)
        update(parameters, optimizer)


@variant(PADDED, NOT_NAMED)
def a_hook_that_sums_at_each_micro_batch(job: Any) -> None:
    parameters, optimizer = start(job)
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    for window, W in epochs(job):
        backward(job, window, W)
        optimizer.step()
        optimizer.zero_grad()


@variant(SHORT, NOT_NAMED)
def windows_of_k_plus_1(job: Any) -> None:
    endless(job, job.K + 1)


@variant(SHORT, "tail carried into the next epoch")
def windows_across_epochs(job: Any) -> None:
    endless(job, job.K)


@variant(SHORT, NOT_NAMED)
def windows_of_2_k(job: Any) -> None:
    parameters, optimizer = start(job)
    stream = iter(job.micro_batches * job.epochs)
    while window := list(islice(stream, 2 * job.K)):
        backward(job, window, weight(window))
        update(parameters, optimizer)


def endless(job: Any, length: int) -> None:
    """Cut the micro-batches of all epochs into windows, and divide by K."""
    parameters, optimizer = start(job)
    for i, batch in enumerate(job.micro_batches * job.epochs, 1):
        (job.loss(job.model, batch) / job.K / job.P).backward()
        if i % length == 0:
            update(parameters, optimizer)


@variant(SHORT, NOT_NAMED)
def one_update_an_epoch(job: Any) -> None:
    parameters, optimizer = start(job)
    for _ in range(job.epochs):
        backward(job, job.micro_batches, weight(job.micro_batches))
        update(parameters, optimizer)


@variant(SHORT, "samples never seen")
def the_first_tail_unread(job: Any) -> None:
    parameters, optimizer = start(job)
    for epoch in range(job.epochs):
        stream = islice(job.micro_batches, None if epoch else job.K)
        while window := list(islice(stream, job.K)):
            backward(job, window, weight(window))
            update(parameters, optimizer)


@variant(SHORT, NOT_NAMED)
def the_first_tail_dropped(job: Any) -> None:
    parameters, optimizer = start(job)
    for number, (window, W) in enumerate(epochs(job)):
        optimizer.zero_grad()
        backward(job, window, W)
        if number != 1:
            update(parameters, optimizer)


@variant(SHORT, NOT_NAMED)
def tail_dropped_and_only_the_last(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        for batch in window:
            optimizer.zero_grad()
            backward(job, [batch], W / job.K)
        if len(window) == job.K:
            update(parameters, optimizer)


@variant(SHORT, NOT_NAMED)
def means_of_pairs(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, _ in epochs(job):
        pairs = [window[i : i + 2] for i in range(0, len(window), 2)]
        for pair in pairs:
            for batch in pair:
                (job.loss(job.model, batch) / len(pair) / len(pairs) / job.P).backward()
        update(parameters, optimizer)


@variant(EVEN, "samples never seen")
def a_process_that_sleeps(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, _ in epochs(job):
        own = [] if job.rank == 1 else window
        backward(job, own, weight(own))
        update(parameters, optimizer)


@variant(EVEN, NOT_NAMED)
def the_gradient_of_process_0(job: Any) -> None:
    parameters, optimizer = start(job)
    for window, W in epochs(job):
        backward(job, window, W / job.P)
        for p in parameters:
            dist.broadcast(p.grad, 0)
        optimizer.step()
        optimizer.zero_grad()


@variant(RESUME, NOT_NAMED)
def a_resume_that_forgets_the_parameters(job: Any) -> None:
    parameters, optimizer = start(job)
    saved = Path(job.folder, "saved")
    for done, (window, W) in enumerate(epochs(job), 1):
        if job.resumes and done <= int(saved.read_text()):
            continue
        backward(job, window, W)
        update(parameters, optimizer)
        if done == job.stop_after:
            saved.write_text(f"{done}")
            return
