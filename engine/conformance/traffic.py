"""Checks of traffic: collectives and host-device syncs of a window, by counting, not by comparing values."""

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
SYNC = "_local_scalar_dense"


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
        syncs = {K: window.syncs for K, window in by_K.items()}
        expect(
            len(set(syncs.values())) == 1,
            f"process {rank}: expected as many host-device syncs in each window, seen (K: syncs) {syncs}.",
        )


class Window(NamedTuple):
    """The counts of a window, and the reductions that the strategy declares."""

    reductions: int
    syncs: int
    said: int


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives, reductions of floating-point tensors and their bytes, and reads from the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()  # reductions, by bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        self.counts["syncs"] += name == SYNC
        self.counts["collectives"] += namespace in GROUPS and not name.startswith("wait")
        if namespace in GROUPS and "reduce" in name:
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            self.counts["reductions"] += bool(sizes)
            moved = [max(sizes, default=0)] if "scatter" in name else sizes
            self.counts["reduced_bytes"] += sum(moved)
            self.sizes.update(moved)
        return func(*args, **(kwargs or {}))


class _Count(Callback):
    """Counts in `run_window` only, since a norm may be reduced at the boundary."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        run_window = strategy.run_window

        def counted(*args: Any) -> None:
            with Calls() as calls:
                run_window(*args)
            self.windows.append(Window(calls.counts["reductions"], calls.counts["syncs"], strategy.reductions()[0]))

        strategy.run_window = counted  # type: ignore[assignment, method-assign]


@cache
def _count(backend: Backend) -> list[dict[int, Window]]:
    """Return the counts of the second window for each process, by K; the first one still builds things."""
    Ks = (1, backend.K) if backend.declared[0].supports_variable_windows else (backend.K,)
    by_K = {K: backend.run(_count_window, Regression(2 * backend.P * N * K), K) for K in Ks}
    return [{K: rows[rank] for K, rows in by_K.items()} for rank in range(backend.processes)]


def _count_window(strategy: Strategy, task: Regression, K: int) -> Window:
    count = _Count()
    fit(strategy, task, {"micro_batch_size": N, "accumulate_grad_batches": K, "max_epochs": 1, "callbacks": [count]})
    return count.windows[1]
