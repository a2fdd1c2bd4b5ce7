"""Checks of traffic: collectives and host-device syncs of a window, by counting, not by comparing values."""

from collections import Counter
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.conformance.backend import Backend, N, NotDeclaredError, expect, fit
from engine.conformance.reference import Regression
from strategies import Strategy

GROUPS = ("c10d", "_c10d_functional")
SYNC = "_local_scalar_dense"


def check_one_reduction(backend: Backend) -> None:
    """Gradients cross the wire once per window, whatever K is, in as many reductions as `reductions()` says."""
    if not backend.strategy.defers_reduction:
        raise NotDeclaredError("defers_reduction = False: gradients cross the wire once per micro-batch")
    for K, windows in _count(backend).items():
        for rank, window in enumerate(windows):
            seen, said = window["reductions"], window["said"]
            where = f"process {rank}: a window of K={K} micro-batches has {seen} reductions of gradients"
            why = "Does accumulation_context defer them, around forward too?"
            expect(seen == said, f"{where}, and reductions() says {said}. {why}")


def check_nothing_per_microbatch(backend: Backend) -> None:
    """The host reads nothing from the device per micro-batch."""
    by_K = _count(backend)
    for rank in range(backend.processes):
        syncs = {K: windows[rank]["syncs"] for K, windows in by_K.items()}
        what = f"process {rank}: expected as many host-device syncs in each window"
        expect(len(set(syncs.values())) == 1, f"{what}, seen (K: syncs) {syncs}.")


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


@cache
def _count(backend: Backend) -> dict[int, list[Counter[str]]]:
    """Return the counts of the second window by K, for each process; the first one still builds things."""
    Ks = (1, backend.K) if backend.strategy.supports_variable_windows else (backend.K,)
    return {K: backend.run(_count_window, Regression(2 * backend.P * N * K), K) for K in Ks}


def _count_window(strategy: Strategy, task: Regression, K: int) -> Counter[str]:
    windows, own_class = list[Counter[str]](), type(strategy)
    run_window = own_class.run_window

    def counted(*args: Any) -> None:  # not the boundary: a norm may be reduced there
        with Calls() as calls:
            run_window(*args)
        windows.append(Counter(calls.counts, said=strategy.reductions()[0]))

    own_class.run_window = counted  # type: ignore[assignment, method-assign]  # in this process alone
    fit(strategy, task, {"accumulate_grad_batches": K, "max_epochs": 1})
    return windows[1]
