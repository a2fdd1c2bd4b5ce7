"""Checks of whole runs: each update is that of one big batch, whatever the data; and a failure ends all processes."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine import GradientAccumulationScheduler
from engine.conformance.backend import Backend, N, NotDeclaredError, expect, fit
from engine.conformance.processes import ProcessesFailedError
from engine.conformance.reference import Regression, WindowRegression, deal, in_order, windows_of
from engine.trainer import Trainer
from strategies import Strategy
from strategies.environment import started_rank

EPOCHS = 2
PLANNED = "this failure was planned"


def check_exact(backend: Backend) -> None:
    """An update is (sum of losses) / (sum of weights): short last windows, ragged micro-batches, clipping."""
    backend.must_be_exact()
    for samples, max_norm in zip(_tails(backend, backend.B), (0.05, None, 0.05), strict=False):
        clipped = f", clipped at {max_norm}" if max_norm else ""
        _check(backend, Regression(samples), f"{samples} samples{clipped}", gradient_clip_norm=max_norm)


def check_weights_known_late(backend: Backend) -> None:
    """Updates are exact if the weights are valid tokens, which are known only when the window is over."""
    backend.must_be_exact()
    for samples in _tails(backend, backend.B):
        _check(backend, Regression(samples, tokens=True), f"tokens of {samples} samples")


def check_variable_windows(backend: Backend) -> None:
    """K changes during a run and each update stays exact; or a schedule is refused before anything starts."""
    scheduling = {0: 2, 1: backend.K, 2: 1}
    if not backend.strategy.supports_variable_windows:
        backend.run(_expect_refusal, scheduling)
        raise NotDeclaredError("supports_variable_windows = False: a schedule is refused")
    one = backend.B // backend.K
    samples = _tails(backend, 2 * backend.B)[-1]
    windows = [window for K in scheduling.values() for window in in_order(samples, one * K)]
    settings = {"accumulate_grad_batches": 1, "callbacks": [GradientAccumulationScheduler(scheduling)]}
    _check(backend, Regression(samples), f"K by epoch {scheduling}", windows, max_epochs=len(scheduling), **settings)


def check_uneven_data(backend: Backend) -> None:
    """Processes whose streams end early, or have no micro-batch at all, take part with weight 0 until all end."""
    if backend.needs_equal_windows:
        raise NotDeclaredError("needs_equal_windows: data that is not even is refused")
    if backend.processes > backend.P:
        raise NotDeclaredError("data_parallel_size < processes: those that share a micro-batch take no streams")
    P, K = backend.P, backend.K
    for lengths in ([K + 2, *[1] * (P - 1)], [K + 1, *[0] * (P - 1)], [*[0] * (P - 1), 2 * K]):
        pieces = deal(lengths, [N, 1, N + 1])
        windows = windows_of(pieces, K)
        task = Regression(sum(map(len, windows)), pieces=pieces)
        _check(backend, task, f"streams of {lengths} micro-batches", windows * EPOCHS)


def check_window_losses(backend: Backend) -> None:
    """A loss over a whole window, run twice, has the gradient of ONE forward of all its samples; or it is refused."""
    backend.must_be_exact()
    if not backend.strategy.supports_window_losses:
        raise NotDeclaredError("supports_window_losses = False: such a task is refused")
    _check(backend, WindowRegression(_tails(backend, backend.B)[-1]), "a loss over whole windows")


def check_error(backend: Backend) -> None:
    """A task that raises on one process ends all of them, and the others name that process and its error."""
    failing, errors = backend.processes - 1, dict[int, str]()
    try:
        backend.attempt(fit, _Failing(2 * backend.B, failing), {"accumulate_grad_batches": backend.K, "max_epochs": 1})
    except ProcessesFailedError as error:
        errors = error.errors
    expect(bool(errors), f"process {failing} raised in its second micro-batch, and no process ended with that.")
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


def _tails(backend: Backend, B: int) -> list[int]:
    """Return numbers of samples with a last window that is full, short, and one sample; only full if it must be."""
    return [2 * B] if backend.needs_equal_windows else [2 * B, B + B // 2 + 1, B + 1]


def _check(
    backend: Backend, task: Regression, what: str, windows: Sequence[Sequence[int]] | None = None, **settings: Any
) -> None:
    """Train; expect each update to have its samples, and process 0 to have the parameters of big batches."""
    windows = windows or in_order(len(task.x), backend.B) * EPOCHS
    ran = backend.fit(task, what, **{"max_epochs": EPOCHS, **settings})
    backend.expect_updates(ran, [len(window) for window in windows], what)
    backend.expect_equal(ran[0].state, task.big_batches(windows, settings.get("gradient_clip_norm")), what)


def _expect_refusal(strategy: Strategy, scheduling: Any) -> None:
    try:
        Trainer(strategy, max_epochs=3, callbacks=GradientAccumulationScheduler(scheduling))
    except ValueError:
        return
    expect(False, "supports_variable_windows is False, and a schedule is not refused.")


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
