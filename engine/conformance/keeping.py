"""Checks of checkpoints: names, every bit, and a resumed run, here and on another number of processes."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from engine.conformance import Backend, NotDeclaredError
from engine.conformance.backend import expect, started, whole
from engine.conformance.reference import Regression, in_order, network
from strategies import Strategy, find


def check_names(backend: Backend) -> None:
    """`state_dict` has the user's own parameter names: no `module.`, no `_orig_mod.`."""
    backend.run(_compare_names, backend.K)


def check_round_trip(backend: Backend) -> None:
    """`load_state_dict` restores what `state_dict` returned, to the bit, and so is the next update."""
    backend.run(_load_again, backend.K)


def check_resume(backend: Backend) -> None:
    """A resumed run is, to the bit, the run that was not interrupted."""
    if not backend.strategy.resumes_exactly:
        raise NotDeclaredError("resumes_exactly = False")
    task = Regression(2 * backend.B, adam=True)
    with TemporaryDirectory() as folder:
        uninterrupted = backend.fit(task, max_updates=5, run_dir=f"{folder}/whole")
        backend.fit(task, max_updates=3, run_dir=f"{folder}/parts")
        resumed = backend.fit(task, max_updates=5, run_dir=f"{folder}/parts")
        wrote = Path(folder, "parts", "summary.json").is_file()
    expect(wrote, "the run's folder has no summary.json: does one process have rank 0?")
    for rank, (one, other) in enumerate(zip(uninterrupted, resumed, strict=True)):
        expect([r["update"] for r in other.records] == [4, 5], f"process {rank} did not resume after update 3.")
        differing = _difference(one.state, other.state)
        expect(not differing, f"process {rank}: {differing} differs from that of a run that was not interrupted.")


def check_change_of_P(backend: Backend) -> None:  # noqa: N802 - a word of this field
    """A run resumed with one process and the plain strategy, and then back, trains the same model."""
    backend.must_be_exact()
    task = Regression(3 * backend.B)
    single = replace(backend, strategy_class=find("single"), options={}, processes=1)
    with TemporaryDirectory() as folder:
        backend.fit(task, max_updates=2, run_dir=folder)
        alone = single.fit(task, max_updates=4, run_dir=folder)
        back = backend.fit(task, max_updates=6, run_dir=folder)
    windows = in_order(len(task.x), backend.B) * 2
    backend.expect_equal(alone[0].state, task.big_batches(windows[:4]), "2 updates, and 2 on one process")
    backend.expect_equal(back[0].state, task.big_batches(windows), "2 updates, 2 on one process, and 2 again")


def _compare_names(strategy: Strategy, K: int) -> None:
    with started(strategy, K, adam=True) as own:
        state = own.update()
        parts = whole(strategy, {"model": state["model"], "optimizer": state["optimizer"]["state"]})
    expected = list(network().state_dict())
    for part, named in parts.items():
        seen = list(named)
        expect(seen == expected, f"{part} has the names {seen[:2]}..., expected {expected[:2]}...")


def _load_again(strategy: Strategy, K: int) -> None:
    with started(strategy, K, adam=True) as own:
        first, second = own.update(), own.update()
        saved = strategy.gather(whole(strategy, first))[0]  # a checkpoint is that of process 0
        strategy.load_state_dict(saved, own.optimizer)
        loaded = strategy.state_dict(own.optimizer)
        again = own.update()
        is_whole = bool(whole(strategy, loaded))
    if is_whole:
        differing = _difference(saved, loaded)
        expect(not differing, f"{differing} is not what was saved, after load_state_dict().")
        differing = _difference(second, again) if strategy.resumes_exactly else ""
        expect(not differing, f"{differing} differs after the same update of what was loaded.")


def _difference(one: Any, other: Any) -> str:
    """Return the place of the first leaf of a state that differs; "" if all are the same to the bit."""
    mine, theirs = ({keystr(path): leaf for path, leaf in tree_leaves_with_path(state)} for state in (one, other))
    return next((name for name in {**mine, **theirs} if not _same(mine.get(name), theirs.get(name))), "")


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)
