"""The methods of a Strategy one by one, as the engine calls them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.conformance import Backend, NotDeclaredError
from engine.conformance.backend import N, expect, started, whole
from engine.conformance.reference import LR, Regression, difference, network
from strategies import Strategy
from strategies.environment import started_rank

DECLARED = (
    "name", "rank", "local_rank", "data_parallel_size", "data_parallel_rank", "device", "supports_variable_windows",
    "exact_to", "defers_reduction", "resumes_exactly",
)  # fmt: skip


def check_declared(backend: Backend) -> None:
    """Rank, P, device and capabilities are known before `setup`, and stay."""
    P, processes, shares = backend.P, backend.processes, sorted(backend.run(_declare))
    expected = sorted(rank % P for rank in range(processes))
    where = f"data_parallel_size is {P} on {processes} processes"
    expect(processes % P == 0, f"{where}: expected a divisor of their number.")
    expect(shares == expected, f"{where}: expected the data-parallel ranks {expected}, seen {shares}.")


def check_messages(backend: Backend) -> None:
    """`exchange`, `gather` and `all_reduce` carry each process's values, in rank order."""
    backend.run(_exchange_messages, range(backend.processes))


def check_effective_batch(backend: Backend) -> None:
    """`effective_batch(N, K)` is what K micro-batches of N samples on each of the P really are."""
    P, K, samples = backend.P, backend.K, backend.B
    real = f"P={P} processes with K={K} micro-batches of N={N} have {samples}"
    for rank, said in enumerate(backend.run(lambda strategy: strategy.effective_batch(N, K))):
        expect(said == samples, f"effective_batch({N}, {K}) on process {rank} says {said}, and {real}.")
    backend.expect_updates(backend.fit(Regression(2 * samples), max_epochs=1), [samples] * 2, "two windows")


def check_backward(backend: Backend) -> None:
    """After a window `p.grad` is the sum over processes and micro-batches of scale x d(loss)."""
    for scale in (0.5, torch.tensor(0.25, dtype=torch.float64)):
        what = f"scale {float(scale)} as a {type(scale).__name__}"
        backend.run(_run_windows, [Case(scale)], backend.K, backend.must_be_exact(), what)


def check_clear_gradients(backend: Backend) -> None:
    """`clear_gradients` leaves nothing for the next window."""
    what = "two windows with clear_gradients() between them"
    backend.run(_run_windows, [Case(1.0), Case(0.5)], backend.K, backend.must_be_exact(), what)


def check_clip(backend: Backend) -> None:
    """`clip` multiplies by `factor`, clips to `max_norm` (or not), and returns the norm between the two."""
    cases = [Case(0.1, True, max_norm, factor) for max_norm in (None, 0.1, 1e6) for factor in (1.0, 0.25)]
    backend.run(_run_windows, cases, backend.K, backend.must_be_exact(), "six windows")


def check_synchronize_buffers(backend: Backend) -> None:
    """`synchronize_buffers` gives all processes the buffers of process 0."""
    if backend.processes > backend.P:
        raise NotDeclaredError("data_parallel_size < processes: each holds another part of the model")
    backend.run(_synchronize_buffers)


class Case(NamedTuple):
    """One window, and the arguments of `clip` after it, if it is called."""

    scale: Any
    clips: bool = False
    max_norm: float | None = None
    factor: float = 1.0


def _run_windows(strategy: Strategy, cases: Sequence[Case], K: int, limit: float, what: str) -> None:
    """Compare the gradients of windows, as a step of SGD shows them, with those of one big batch."""
    seen = []
    with started(strategy, K) as own:
        for case in cases:
            before = whole(strategy, strategy.state_dict()["model"])
            own.run_window(case.scale.to(strategy.device) if isinstance(case.scale, torch.Tensor) else case.scale)
            norm = strategy.clip(case.max_norm, case.factor).item() if case.clips else math.nan
            seen.append((case, before, whole(strategy, own.step()["model"]), norm))
    for case, before, after, norm in seen:
        if not before:
            return  # another process has the whole
        where = f"{what}, clip({case.max_norm}, {case.factor})" if case.clips else what
        model = network()
        model.load_state_dict(dict(zip(model.state_dict(), before.values(), strict=True)))
        factor = float(case.scale) * float(own.task.weight.sum()) * case.factor
        expected_norm = own.task.set_gradient(model, range(len(own.task.x)), factor, case.max_norm)
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found = torch.cat([(before[name] - after[name]).flatten() for name in after]) / LR
        off, ratio = difference({"": found}, {"": expected}), float(found.norm() / expected.norm())
        seen_there = f"the gradient is {ratio:.4g} times the length of the one expected, off by {off:.1e}"
        expect(off <= max(limit, 1e-12), f"{where}: {seen_there} where {limit:g} (relative) is promised.")
        needed = f"expected {expected_norm:.6g}, that after the factor and before the clipping"
        is_right = not case.clips or abs(norm - expected_norm) <= limit * expected_norm
        expect(is_right, f"{where} returned the norm {norm:.6g}: {needed}.")


def _declare(strategy: Strategy) -> int:
    """Compare the declarations before and after `setup`; return the data-parallel rank."""
    early = {name: getattr(strategy, name) for name in DECLARED}
    with started(strategy):
        late = {name: getattr(strategy, name) for name in DECLARED}
    for name, first in early.items():
        expect(first == late[name], f"{name} is {first} before setup() and {late[name]} after.")
    expect(early["rank"] == started_rank(), f"expected rank {started_rank()}, seen {early['rank']}.")
    variable = early["supports_variable_windows"]
    expect(isinstance(variable, bool), f"supports_variable_windows is {variable!r}: expected True or False.")
    return int(early["data_parallel_rank"])


def _exchange_messages(strategy: Strategy, processes: range) -> None:
    with started(strategy):
        rank, device = float(strategy.rank), strategy.device
        receive = strategy.exchange([rank, rank * 0.5, 0.0, rank, -rank])
        gathered = strategy.gather(f"from {strategy.rank}")
        reduced = [strategy.all_reduce(torch.tensor([rank], device=device), op).item() for op in ("sum", "min", "max")]
        rows = receive()
    all_rows = [[rank, rank * 0.5, 0.0, rank, -rank] for rank in processes]
    sums = [sum(processes), sum(processes) * 0.5, 0.0, max(processes), 0.0]
    for name, seen, expected in (
        ("exchange", rows, all_rows if len(rows) == len(processes) else [sums]),
        ("gather", gathered, [f"from {rank}" for rank in processes]),
        ("all_reduce", reduced, [sum(processes), 0.0, max(processes)]),
    ):
        expect(seen == expected, f"{name}: expected {expected}, seen {seen}.")


def _synchronize_buffers(strategy: Strategy) -> None:
    with started(strategy):
        norm = nn.BatchNorm1d(3).to(strategy.device)
        assert norm.running_mean is not None
        norm.running_mean.fill_(strategy.rank)
        strategy.synchronize_buffers(norm)
        seen = float(norm.running_mean.max())
    expect(seen == 0.0, f"expected the 0 of process 0 in the buffer, seen {seen:g}.")
