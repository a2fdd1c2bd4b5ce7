"""Memory that runs out: the same samples run again in smaller micro-batches, on all processes, to the same update."""

from __future__ import annotations

import random
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Trainer
from engine.errors import UserError
from tests.kit.hungry import DDP, DP, HungryClip, HungryGroups, HungryRegression, HungrySequences, Single, TooLarge, fit
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Watch, big_batch_run, in_order, parameters
from tests.kit.terms import Groups
from tests.kit.terms import reference as terms_reference
from tests.kit.tokens import Sequences, big_batch
from tests.kit.windows import Clip, reference

B, SAMPLES = 24, 69
WAYS = [(1, Single), (1, DP), (1, DDP), (2, DDP), (3, DDP)]


def phases(P: int) -> Any:
    """In a forward, a backward that is not reduced and one that is, on different processes: N = 8, 4, 2, 1."""
    return {0: ("forward", 0), 2: ("middle", P - 1), 4: ("last", P // 2)}


def trained(kind: Any, strategy: Any, P: int, options: dict[str, Any]) -> Any:
    return fit(kind(SAMPLES, phases(P)), strategy(**options), 8, B, shuffle=False)


def check(results: Any, expected: torch.Tensor, P: int) -> None:
    Ns = [8, 4, 4, 2, 2, 1]  # of each update, after those that ran again
    for found, records, _ in results:
        assert (found - expected).abs().max() < 1e-12
        assert [N for N, _, _ in records] == [Ns[update + 1] if update % 2 == 0 else Ns[update] for update in range(6)]
        assert [K for _, K, _ in records] == [-(-B // (P * N)) for N, _, _ in records]
        assert [samples for *_, samples in records] == [24, 24, 21] * 2


@pytest.mark.parametrize(("P", "strategy"), WAYS)
def test_means_over_samples(P: int, strategy: Any) -> None:
    results = run(P, trained, HungryRegression, strategy, P, {})
    check(results, big_batch_run(Regression(SAMPLES), [in_order(SAMPLES, B)] * 2), P)


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_options_of_ddp(options: dict[str, Any]) -> None:
    results = run(2, trained, HungryRegression, DDP, 2, options)
    check(results, big_batch_run(Regression(SAMPLES), [in_order(SAMPLES, B)] * 2), 2)


@pytest.mark.parametrize(("P", "strategy"), [WAYS[-1], pytest.param(2, DDP, marks=pytest.mark.slow)])
def test_weights_of_tokens(P: int, strategy: Any) -> None:
    task = Sequences(SAMPLES, masked=range(3))
    expected, _ = big_batch(task, in_order(SAMPLES, B), 2, None)
    check(run(P, trained, HungrySequences, strategy, P, {}), expected, P)


@pytest.mark.parametrize(("P", "strategy"), [WAYS[0], WAYS[-2], pytest.param(3, DDP, marks=pytest.mark.slow)])
def test_losses_over_windows(P: int, strategy: Any) -> None:
    expected, *_ = reference(Clip(SAMPLES), B)
    check(run(P, trained, HungryClip, strategy, P, {}), expected, P)


@pytest.mark.parametrize(("P", "strategy"), [WAYS[0], WAYS[-2]])
def test_while_terms_are_counted(P: int, strategy: Any) -> None:
    windows = [[range(start + i, start + i + N) for i in range(0, 12, N)] for start, N in ((0, 6), (12, 3))]
    expected, _ = terms_reference(Groups(24), windows)
    for found, records, _ in run(P, lambda: fit(HungryGroups(24, P - 1), strategy(), 6, 12, epochs=1, shuffle=False)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert [N for N, _, _ in records] == [6, 3]


class Dropping(HungryRegression):
    """Buffers, and draws of the host's generators, that a dropped window must not leave behind."""

    def __init__(self, samples: int, at: Any) -> None:
        super().__init__(samples, at, model=lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
        self.x, self.y = self.x.float(), self.y.float()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, _ = batch
        x = torch.cat([x, x.mean(0, keepdim=True)]) * random.random()  # BatchNorm wants two
        loss = nn.functional.mse_loss(model(x)[:-1], y)
        self.eat(model)
        return loss


def with_folder(folder: str | None, at: Any, updates: int) -> Any:
    task = Dropping(SAMPLES, at)
    result = fit(task, DDP(), 4, B, run_dir=folder, max_updates=updates, keep_last_checkpoints=9)
    return result[0], result[1], [b.clone() for b in task.trainer.model.buffers()]


def test_a_run_that_resumes_after_it_is_the_run_that_did_not_end(tmp_path: Path) -> None:
    at = {1: ("last", 1)}
    whole = run(2, with_folder, str(tmp_path / "whole"), at, 6)
    run(2, with_folder, str(tmp_path / "parts"), at, 3)
    parts = run(2, with_folder, str(tmp_path / "parts"), {}, 6)
    for (a, records, buffers), (b, later, others) in zip(whole, parts, strict=True):
        assert [N for N, *_ in records] == [4, 2, 2, 2, 2, 2]
        assert torch.equal(a, b)
        assert later == records[3:]  # N is that of the checkpoint
        assert all(map(torch.equal, buffers, others))


def test_a_dropped_window_leaves_no_trace(tmp_path: Path) -> None:
    dropped = run(1, with_folder, str(tmp_path / "a"), {0: ("middle", 0)}, 2)
    plain = run(1, smaller, str(tmp_path / "b"))
    for (a, _, buffers), (b, others) in zip(dropped, plain, strict=True):
        assert torch.equal(a, b)
        assert all(map(torch.equal, buffers, others))


def smaller(folder: str) -> Any:
    task = Dropping(SAMPLES, {})
    found, *_ = fit(task, DDP(), 2, B, run_dir=folder, max_updates=2)
    return found, [b.clone() for b in task.trainer.model.buffers()]


class Wide(Regression):
    """A forward that needs some 16 kB for each sample and layer."""

    def __init__(self) -> None:
        super().__init__(4096, model=lambda: nn.Sequential(nn.Linear(5, 2048), nn.Tanh(), nn.Linear(2048, 1)).double())


def limited(extra: int | None) -> Any:
    task, watch = Wide(), Watch()
    trainer = Trainer("single", micro_batch_size=4096, max_epochs=2, callbacks=watch)
    if extra is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
    trainer.fit(task)
    return parameters(trainer.model), [record["micro_batch_size"] for record in watch.records]


def test_memory_that_really_runs_out() -> None:
    (expected, sizes), (found, smaller) = (run(1, limited, extra, group=False)[0] for extra in (None, 100 << 20))
    assert sizes == [4096, 4096]
    assert smaller[0] < 4096
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: ...")])
def test_the_errors_of_other_allocators(error: Exception) -> None:
    task = HungryRegression(SAMPLES, {1: ("forward", 0)})
    task.error = error
    found, records, _ = fit(task, Single(), 8, B, shuffle=False)
    assert [N for N, *_ in records] == [8, 4, 4, 4, 4, 4]
    assert (found - big_batch_run(Regression(SAMPLES), [in_order(SAMPLES, B)] * 2)).abs().max() < 1e-12


class Freed(HungryRegression):
    """Knows what a forward that failed held."""

    held: Any = None

    def loss(self, model: nn.Module, batch: Any) -> Any:
        assert self.held is None or self.held() is None
        hidden = model(batch[0]).exp()
        if self.held is None:
            self.held = weakref.ref(hidden)
        self.eat(model)
        return super().loss(model, batch)


def test_what_did_not_fit_is_freed_before_it_runs_again() -> None:
    fit(Freed(SAMPLES, {0: ("forward", 0)}), Single(), 8, B)


def test_one_sample_that_does_not_fit_is_an_error_on_all_processes() -> None:
    @on_processes(2)
    def texts() -> str:
        with pytest.raises(UserError) as caught:
            fit(TooLarge(SAMPLES, 0), DDP(), 4, B)
        return str(caught.value)

    for text in texts:
        assert text.startswith("update 0 does not fit into memory, with one sample in each micro-batch: process 1: Out")


class LargeLoss(Clip):
    def window_loss(self, outputs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory.")


def test_a_window_loss_that_does_not_fit_is_an_error_at_once() -> None:
    with pytest.raises(ChildError) as caught:
        run(2, lambda: fit(LargeLoss(12), DDP(), 2, 12, epochs=1))
    for text in caught.value.errors.values():
        assert "window_loss() does not fit into memory, whatever the micro-batches: " in text


class Wrapping(DDP):
    """A wrapper of the user's own: its hooks may send anything."""

    def wrap(self, model: nn.Module) -> Any:
        return super().wrap(model)


def test_where_it_cannot_be_done_the_run_ends_as_ever() -> None:
    with pytest.raises(ChildError) as caught:
        run(2, trained, HungryRegression, Wrapping, 2, {})
    assert "out of memory, as a test wants it" in caught.value.errors[1]
    assert "process 1 failed: OutOfMemoryError" in caught.value.errors[0]
