"""Checks of failures: if one process fails, all report it, and none waits forever."""

from typing import Any

from torch import nn

from engine.conformance.backend import Backend, BrokenPromiseError, expect, fit
from engine.conformance.processes import ProcessesFailedError
from engine.conformance.reference import Regression, in_order
from strategies.environment import started_rank

PLANNED = "this failure was planned"


def check_error(backend: Backend) -> None:
    """A task that raises on one process ends all of them, and the others name that process and its error."""
    failing = backend.processes - 1
    try:
        backend.attempt(fit, _Failing(2 * backend.B, failing), {"accumulate_grad_batches": backend.K, "max_epochs": 1})
    except ProcessesFailedError as error:
        errors = error.errors
    else:
        raise BrokenPromiseError(f"process {failing} raised in its second micro-batch, and no process ended with that.")
    for rank in range(backend.processes):
        seen = errors.get(rank, "no error")
        for words in (PLANNED, *([f"process {failing}"] if rank != failing else [])):
            expect(words in seen, f"process {rank} ended with {seen!r}: expected {words!r} in its message.")


def check_not_finite(backend: Backend) -> None:
    """An update that is not finite is skipped on all processes, and does not affect the next one."""
    task = Regression(3 * backend.B)
    windows = in_order(len(task.x), backend.B)
    task.x[windows[1][-1]] = float("nan")
    ran = backend.fit(task, max_epochs=1)
    for rank, own in enumerate(ran):
        seen = [record["skipped"] for record in own.records]
        expect(seen == [0, 1, 1], f"process {rank}: expected to skip the second update alone, seen {seen} (a sum).")
    finite = all(bool(value.isfinite().all()) for value in ran[0].state.values())
    expect(finite, "parameters are not finite after an update that should have been skipped.")
    backend.expect_equal(ran[0].state, task.big_batches([windows[0], windows[2]]), "the updates around it")


class _Failing(Regression):
    """Raises in the second micro-batch of one process."""

    def __init__(self, samples: int, failing: int) -> None:
        super().__init__(samples)
        self.failing, self.seen = failing, 0

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.seen += 1
        if self.seen == 2 and started_rank() == self.failing:
            raise RuntimeError(PLANNED)
        return super().loss(model, batch)
