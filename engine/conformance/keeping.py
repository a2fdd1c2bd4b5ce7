"""Checks of checkpoints: names, every bit, and a resumed run, here and on another number of processes."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from engine.conformance import Backend, NotDeclaredError
from engine.conformance.backend import N, Started, expect, has_whole_state, run_window, started
from engine.conformance.reference import Regression, deal, in_order, network
from strategies import Strategy


def check_names(backend: Backend) -> None:
    """`state_dict` has the user's own parameter names: no `module.`, no `_orig_mod.`."""
    expected = list(network().state_dict())
    for rank, kept in enumerate(_kept(backend)):
        for part, state in (("model", kept.first["model"]), ("optimizer", kept.first["optimizer"]["state"])):
            seen, wrong = list(state), f"process {rank}: {part} has the names {list(state)[:2]}..."
            expect(seen == expected or (rank > 0 and not seen), f"{wrong}, expected {expected[:2]}...")


def check_round_trip(backend: Backend) -> None:
    """`load_state_dict` restores what `state_dict` returned, to the bit, and so is the next update."""
    saved, resumes_exactly = _kept(backend)[0].first, backend.declared[0].resumes_exactly
    for rank, kept in enumerate(_kept(backend)):
        expect(
            not kept.first["model"] or _same(saved, kept.loaded),
            f"process {rank}: {_what(saved, kept.loaded)} is not what was saved, after load_state_dict().",
        )
        expect(
            not resumes_exactly or _same(kept.second, kept.again),
            f"process {rank}: {_what(kept.second, kept.again)} differs after the same update of what was loaded.",
        )


def check_resume(backend: Backend) -> None:
    """A resumed run is, to the bit, the run that was not interrupted."""
    if not backend.declared[0].resumes_exactly:
        raise NotDeclaredError("resumes_exactly = False")
    task = Regression(2 * backend.P * N * backend.K, adam=True)
    with TemporaryDirectory() as folder:
        whole = backend.fit(task, max_updates=5, run_dir=f"{folder}/whole")
        backend.fit(task, max_updates=3, run_dir=f"{folder}/parts")
        parts = backend.fit(task, max_updates=5, run_dir=f"{folder}/parts")
        wrote = Path(folder, "parts", "summary.json").is_file()
    expect(wrote, "the run's folder has no summary.json: does one process have rank 0?")
    for rank, (one, other) in enumerate(zip(whole, parts, strict=True)):
        expect([r["update"] for r in other.records] == [4, 5], f"process {rank} did not resume after update 3.")
        expect(
            _same(one.state, other.state),
            f"process {rank}: {_what(one.state, other.state)} differs from that of a run that was not interrupted.",
        )


def check_change_of_P(backend: Backend) -> None:  # noqa: N802 - a word of this field
    """A run resumed with one process and the plain strategy, and then back, trains the same model."""
    backend.must_be_exact()
    B = backend.P * N * backend.K
    task = Regression(3 * B)
    with TemporaryDirectory() as folder:
        backend.fit(task, max_updates=2, run_dir=folder)
        alone = backend.fit(task, strategy="single", max_updates=4, run_dir=folder)
        back = backend.fit(task, max_updates=6, run_dir=folder)
    windows = in_order(3 * B, B) * 2
    backend.expect_equal(alone[0].state, task.big_batches(windows[:4]), "2 updates, and 2 on one process")
    backend.expect_equal(back[0].state, task.big_batches(windows), "2 updates, 2 on one process, and 2 again")


NOTHING: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}}


class Kept(NamedTuple):
    """States after one update, when loaded again after a second, and after the second, both times."""

    first: dict[str, Any]
    loaded: dict[str, Any]
    second: dict[str, Any]
    again: dict[str, Any]


@cache
def _kept(backend: Backend) -> list[Kept]:
    return backend.run(_keep, backend.K)


def _keep(strategy: Strategy, K: int) -> Kept:
    pieces = deal([K] * strategy.data_parallel_size, [N])
    task = Regression(strategy.data_parallel_size * K * N, adam=True, pieces=pieces)
    with started(strategy) as own:
        optimizer = task.configure_optimizer(own.module)
        _update(strategy, own, optimizer, task, K)
        first = strategy.state_dict(optimizer)
        _update(strategy, own, optimizer, task, K)
        second = strategy.state_dict(optimizer)
        strategy.load_state_dict(strategy.gather(first)[0], optimizer)  # a checkpoint is that of process 0
        loaded = strategy.state_dict(optimizer)
        _update(strategy, own, optimizer, task, K)
        kept = Kept(first, loaded, second, strategy.state_dict(optimizer))
        return kept if has_whole_state(strategy) else Kept(NOTHING, NOTHING, NOTHING, NOTHING)


def _update(strategy: Strategy, own: Started, optimizer: torch.optim.Optimizer, task: Regression, K: int) -> None:
    run_window(strategy, own, optimizer, task, K, 0.1)
    optimizer.step()
    strategy.clear_gradients()


def _what(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the name of the first part of a state that differs."""
    for name, value in one.items():
        if name not in other or not _same(value, other[name]):
            inner = isinstance(value, dict) and isinstance(other.get(name), dict)
            return f"{name} {_what(value, other[name])}".strip() if inner else str(name)
    return ""


def _same(one: Any, other: Any) -> bool:
    mine, theirs = tree_leaves(one), tree_leaves(other)
    return len(mine) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(mine, theirs, strict=True)
    )
