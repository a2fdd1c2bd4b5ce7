"""The methods of a Strategy one by one, as the engine calls them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.conformance import Backend, NotDeclaredError
from engine.conformance.backend import N, declare, expect, has_whole_state, run_window, started
from engine.conformance.reference import LR, Regression, State, deal, difference, network
from strategies import Strategy


def check_declared(backend: Backend) -> None:
    """Rank, P, device and capabilities are known before `setup`, and stay."""
    before, after = backend.declared, backend.run(_declared_after_setup)
    for rank, (early, late) in enumerate(zip(before, after, strict=True)):
        for name, first, then in zip(early._fields, early, late, strict=True):
            expect(first == then, f"process {rank}: {name} is {first} before setup() and {then} after.")
        expect(early.rank == rank, f"process {rank}: expected rank {rank}, seen {early.rank}.")
        variable = early.supports_variable_windows
        expect(isinstance(variable, bool), f"supports_variable_windows is {variable!r}: expected True or False.")
    P, processes = backend.P, backend.processes
    shares = sorted(row.data_parallel_rank for row in before)
    expected = sorted(rank % P for rank in range(processes))
    expect(
        processes % P == 0 and shares == expected,
        f"data_parallel_size is {P} on {processes} processes: expected the data-parallel ranks {expected}, as many "
        f"processes each, seen {shares}.",
    )


def check_messages(backend: Backend) -> None:
    """`exchange`, `gather` and `all_reduce` carry each process's values, in rank order."""
    processes = range(backend.processes)
    expected = (
        [[rank, rank * 0.5] for rank in processes],
        [f"from {rank}" for rank in processes],
        [sum(processes), 0.0, max(processes)],
    )
    for rank, seen in enumerate(backend.run(_messages)):
        for name, mine, theirs in zip(("exchange", "gather", "all_reduce"), seen, expected, strict=True):
            expect(mine == theirs, f"{name} on process {rank}: expected {theirs}, seen {mine}.")


def check_effective_batch(backend: Backend) -> None:
    """`effective_batch(N, K)` is what K micro-batches of N samples on each of the P really are."""
    P, K = backend.P, backend.K
    samples = P * N * K
    for rank, said in enumerate(backend.run(lambda strategy: strategy.effective_batch(N, K))):
        expect(
            said == samples,
            f"effective_batch({N}, {K}) on process {rank} says {said}, and P={P} processes with K={K} micro-batches of "
            f"N={N} have {samples}.",
        )
    for rank, ran in enumerate(backend.fit(Regression(2 * samples), max_epochs=1)):
        seen = [record["effective_batch"] for record in ran.records]
        expect(seen == [samples] * 2, f"process {rank}: expected two updates of {samples} samples, seen {seen}.")


def check_backward(backend: Backend) -> None:
    """After a window `p.grad` is the sum over processes and micro-batches of scale x d(loss)."""
    for scale in (0.5, torch.tensor(0.25, dtype=torch.float64)):
        _check_windows(backend, [Case(scale)], f"scale {float(scale)} as a {type(scale).__name__}")


def check_clear_gradients(backend: Backend) -> None:
    """`clear_gradients` leaves nothing for the next window."""
    _check_windows(backend, [Case(1.0), Case(0.5)], "two windows with clear_gradients() between them")


def check_clip(backend: Backend) -> None:
    """`clip` multiplies by `factor`, clips to `max_norm` (or not), and returns the norm between the two."""
    cases = [Case(0.1, True, max_norm, factor) for max_norm in (None, 0.1, 1e6) for factor in (1.0, 0.25)]
    _check_windows(backend, cases, "six windows")


def check_synchronize_buffers(backend: Backend) -> None:
    """`synchronize_buffers` gives all processes the buffers of process 0."""
    if backend.processes > backend.P:
        raise NotDeclaredError("data_parallel_size < processes: each holds another part of the model")
    for rank, seen in enumerate(backend.run(_buffers)):
        expect(seen == 0.0, f"process {rank}: expected the 0 of process 0 in the buffer, seen {seen:g}.")


class Case(NamedTuple):
    """One window, and the arguments of `clip` after it, if it is called."""

    scale: Any
    clips: bool = False
    max_norm: float | None = None
    factor: float = 1.0


class Seen(NamedTuple):
    """The parameters before and after a window and a step of SGD, and the norm."""

    before: State
    after: State
    norm: float


def _check_windows(backend: Backend, cases: Sequence[Case], what: str) -> None:
    """Compare the gradients of windows, as a step of SGD shows them, with those of one big batch."""
    limit = backend.must_be_exact()
    pieces = deal([backend.K] * backend.P, [N])
    task = Regression(backend.P * backend.K * N, tokens=True, pieces=pieces)
    for rank, rows in enumerate(backend.run(_run_windows, task, cases, backend.K)):
        for case, seen in zip(cases, rows, strict=bool(rows)):
            gradient, norm = _expected(task, case, seen.before)
            found = {n: (seen.before[n] - seen.after[n]) / LR for n in seen.after}
            off = difference(found, gradient)
            where = f"{what}, clip({case.max_norm}, {case.factor})" if case.clips else what
            expect(
                off <= max(limit, 1e-12),
                f"{where}: on process {rank} the gradient is {_ratio(found, gradient)} of the one expected, off by "
                f"{off:.1e} where {limit:g} (relative) is promised.",
            )
            if case.clips:
                expect(
                    abs(seen.norm - norm) <= limit * norm,
                    f"{where} returned the norm {seen.norm:.6g} on process {rank}: expected {norm:.6g}, that after "
                    "the factor and before the clipping.",
                )


def _expected(task: Regression, case: Case, state: State) -> tuple[State, float]:
    """Return the gradient after `case`, by one big batch, and its norm before the clipping."""
    model = network()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), state.values(), strict=True):
            parameter.copy_(value)
    factor = float(case.scale) * float(task.weight.sum()) * case.factor
    gradients = [g * factor for g in task.gradient(model, range(len(task.x)))]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    clip = 1.0 if case.max_norm is None else min(1.0, case.max_norm / (norm + 1e-6))
    return {name: g * clip for name, g in zip(state, gradients, strict=True)}, norm


def _ratio(found: State, expected: State) -> str:
    mine, theirs = (float(torch.cat([v.flatten() for v in state.values()]).norm()) for state in (found, expected))
    return f"{mine / theirs:.4g} times the length"


def _run_windows(strategy: Strategy, task: Regression, cases: Sequence[Case], K: int) -> list[Seen]:
    rows = []
    with started(strategy) as own:
        optimizer = torch.optim.SGD(own.module.parameters(), lr=LR)
        for case in cases:
            before = strategy.state_dict()["model"]
            scale = case.scale.to(strategy.device) if isinstance(case.scale, torch.Tensor) else case.scale
            run_window(strategy, own, optimizer, task, K, scale)
            norm = strategy.clip(case.max_norm, case.factor).item() if case.clips else math.nan
            optimizer.step()
            strategy.clear_gradients()
            rows.append(Seen(before, strategy.state_dict()["model"], norm))
        return rows if has_whole_state(strategy) else []


def _declared_after_setup(strategy: Strategy) -> Any:
    with started(strategy):
        return declare(strategy)


def _messages(strategy: Strategy) -> Any:
    with started(strategy):
        rank = strategy.rank
        receive = strategy.exchange([float(rank), rank * 0.5])
        gathered = strategy.gather(f"from {rank}")
        ops = ("sum", "min", "max")
        reduced = [strategy.all_reduce(torch.tensor([float(rank)], device=strategy.device), op).item() for op in ops]
        return receive(), gathered, reduced


def _buffers(strategy: Strategy) -> float:
    with started(strategy):
        norm = nn.BatchNorm1d(3).to(strategy.device)
        assert norm.running_mean is not None
        norm.running_mean.fill_(strategy.rank)
        strategy.synchronize_buffers(norm)
        return float(norm.running_mean.max())
