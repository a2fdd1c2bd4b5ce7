"""Checks of traffic: collectives and host-device syncs of a window, by counting, not by comparing values."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.callbacks import Callback
from engine.conformance.backend import Backend, N, NotDeclaredError, expect, fit
from engine.conformance.reference import Regression
from engine.trainer import Trainer
from strategies import Strategy

GROUPS = ("c10d", "_c10d_functional")
LOOK = "_local_scalar_dense"


def check_one_reduction(backend: Backend) -> None:
    """Gradients cross the wire once per window, whatever K is, in as many reductions as `reductions()` says."""
    if not backend.declared[0].defers_reduction:
        raise NotDeclaredError("defers_reduction = False: gradients cross the wire once per micro-batch")
    for rank, by_K in enumerate(_count(backend)):
        for K, window in by_K.items():
            expect(
                window.reductions == window.said,
                f"process {rank}: a window of K={K} micro-batches has {window.reductions} reductions of gradients, and "
                f"reductions() says {window.said}. Does accumulation_context defer them, around forward too?",
            )


def check_nothing_per_microbatch(backend: Backend) -> None:
    """The host reads nothing from the device per micro-batch."""
    for rank, by_K in enumerate(_count(backend)):
        looks = {K: window.looks for K, window in by_K.items()}
        expect(
            len(set(looks.values())) == 1,
            f"process {rank}: expected as many looks at the device in each window, seen (K: looks) {looks}.",
        )


class Window(NamedTuple):
    """The counts of a window, and the number of reductions that the strategy declares."""

    reductions: int
    looks: int
    said: int


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts reductions of floating-point tensors over processes, and reads of a number from the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call, and make it."""
        namespace, _, name = func._schema.name.partition("::")
        if name == LOOK:
            self.counts["looks"] += 1
        if namespace in GROUPS and "reduce" in name and any(_is_float(leaf) for leaf in tree_leaves(args)):
            self.counts["reductions"] += 1
        return func(*args, **(kwargs or {}))


class _Count(Callback):
    """Counts in `run_window` alone: not at the boundary, where a norm may be reduced."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        run_window = strategy.run_window

        def counted(*args: Any) -> None:
            with Calls() as calls:
                run_window(*args)
            found = calls.counts["reductions"], calls.counts["looks"], strategy.reductions()[0]
            self.windows.append(Window(*found))

        strategy.run_window = counted  # type: ignore[assignment, method-assign]


@cache
def _count(backend: Backend) -> list[dict[int, Window]]:
    """For each process, by K: what the second window did (in the first, things are still being made)."""
    Ks = (1, backend.K) if backend.declared[0].supports_variable_windows else (backend.K,)
    by_K = {K: backend.run(_count_window, Regression(2 * backend.P * N * K), K) for K in Ks}
    return [{K: rows[rank] for K, rows in by_K.items()} for rank in range(backend.processes)]


def _count_window(strategy: Strategy, task: Regression, K: int) -> Window:
    count = _Count()
    settings = {"micro_batch_size": N, "accumulate_grad_batches": K, "max_epochs": 1, "callbacks": [count]}
    fit(strategy, task, settings)
    return count.windows[1]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
