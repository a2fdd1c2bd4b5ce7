"""Communication hooks by name: how far off, and how many bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine import Trainer
from engine.cli.main import parse
from strategies import DDPStrategy
from tests.kit.killed import fit, history, same
from tests.kit.processes import on_processes, run
from tests.kit.recorders import Collectives
from tests.kit.reference import Regression, Watch, big_batch_run, in_order, parameters

N = 4
OFF = {"fp16": 5e-4, "bf16": 5e-3}
"""Relative errors of a gradient; measured are 3e-4 and 3e-3 at most."""


def strategy(hook: str, **options: Any) -> DDPStrategy:
    return DDPStrategy(communication_hook=hook, bucket_cap_mb=1e-4, timeout_seconds=20, **options)


def wide() -> nn.Module:
    """Matrices that are worth compressing, in several buckets."""
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).double()


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(
        ValueError, match=r"communication_hook='powersgd': expected one of fp16, bf16, or None.*DDPStrategy\.wrap"
    ):
        DDPStrategy(communication_hook="powersgd")  # type: ignore[arg-type]


def test_hooks_are_options_of_the_command_line() -> None:
    chosen = ["--trainer.strategy=strategies.DDPStrategy", "--trainer.strategy.communication_hook=fp16"]
    parser, config = parse(chosen)
    assert parser.instantiate(config).trainer.strategy.communication_hook == "fp16"
    with pytest.raises(Exception, match=r"fp16.*bf16"):
        parse([chosen[0], "--trainer.strategy.communication_hook=fp8"])


@pytest.mark.parametrize("hook", OFF)
@pytest.mark.parametrize(("P", "samples"), [(2, 16), (3, 17), (3, 5)])
def test_a_gradient_is_as_far_off_as_is_said(P: int, samples: int, hook: str) -> None:
    """With 5 samples a process has none."""
    task = Regression(samples, lr=1.0, model=wide)
    torch.manual_seed(0)
    exact = parameters(wide()) - big_batch_run(task, [in_order(samples, samples)])

    @on_processes(P)
    def results() -> Any:
        torch.manual_seed(0)
        before = parameters(wide())
        trainer = Trainer(strategy(hook), micro_batch_size=N, accumulate_grad_batches=2, max_epochs=1, shuffle=False)
        trainer.fit(Regression(samples, lr=1.0, model=wide))
        assert trainer.update == 1
        return before - parameters(trainer.model)

    for found in results:
        off = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)
        assert 1e-6 < off < OFF[hook]


def test_fp16_holds_its_largest_number_on_one_process_alone() -> None:
    """A cast before the division by P would overflow: DDP hands over P times the gradient."""

    @on_processes(3)
    def gradients() -> float:
        chosen = DDPStrategy(communication_hook="fp16")
        model = chosen.prepare(nn.Linear(1, 1, bias=False))
        with chosen.accumulation_context(is_last_microbatch=True):
            chosen.backward(model(torch.ones(1)).sum(), 50_000.0 if dist.get_rank() == 0 else 0.0)
        return float(next(model.parameters()).grad)

    assert gradients == [pytest.approx(50_000.0, rel=1e-3)] * 3


class Bytes(Collectives):
    """Counts the payload, too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::allreduce_":
            self.bytes += sum(t.nbytes for t in args[0])
        if func._schema.name == "c10d::allgather_":
            self.bytes += sum(t.nbytes for t in args[0][0])
        return super().__torch_dispatch__(func, types, args, kwargs)


class CountBytes(Watch):
    def on_fit_start(self, trainer: Any) -> None:
        self.mode, self.bytes = Bytes(), []
        self.mode.__enter__()

    def on_epoch_start(self, trainer: Any) -> None:
        self.mode.bytes = 0  # the end of an epoch compares replicas

    def on_update_end(self, trainer: Any) -> None:
        self.bytes.append(self.mode.bytes)
        self.mode.bytes = 0

    def on_fit_end(self, trainer: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.told = trainer.strategy.reductions()


class Single(Regression):
    def __init__(self, samples: int) -> None:
        super().__init__(samples, model=lambda: wide().float())
        self.x, self.y = self.x.float(), self.y.float()


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize(("hook", "part"), [(None, 1.0), ("fp16", 0.5), ("bf16", 0.5)])
def test_half_the_gradients_bytes_cross_the_wire(hook: str | None, part: float, K: int) -> None:
    gradients = 4 * sum(p.numel() for p in wide().parameters())

    @on_processes(2)
    def results() -> Any:
        watch = CountBytes()
        Trainer(strategy(hook), micro_batch_size=N, accumulate_grad_batches=K, max_epochs=2, callbacks=watch).fit(
            Single(4 * N * K + 1)
        )
        return watch.bytes, watch.told

    for counted, (buckets, told) in results:
        assert told == part * gradients
        assert buckets > 1
        for update in counted:
            assert part * gradients < update <= part * gradients + 128 * 2


class Spoiled(Regression):
    """The second window has a sample whose loss is too large; `without` leaves the window out."""

    def __init__(self, factor: float, without: bool) -> None:
        super().__init__(7 * N, model=wide)
        self.factor = factor
        if without:
            self.x, self.y = (torch.cat([t[: 2 * N], t[4 * N :]]) for t in (self.x, self.y))

    def train_data(self) -> Any:
        spoiled = torch.ones(len(self.x), 1, dtype=torch.float64)
        if len(self.x) == 7 * N:
            spoiled[2 * N] = self.factor
        return torch.utils.data.TensorDataset(self.x, self.y, spoiled)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, factor = batch
        return ((model(x) - y) ** 2 * factor).mean()


def train_spoiled(hook: str, factor: float, without: bool) -> Any:
    trainer = Trainer(strategy(hook), micro_batch_size=N, max_epochs=1, shuffle=False)
    trainer.fit(Spoiled(factor, without))
    return trainer.skipped, parameters(trainer.model)


@pytest.mark.parametrize(("hook", "factor"), [("fp16", 1e7), ("fp16", math.nan), ("bf16", math.inf)])
def test_an_update_that_is_not_finite_is_skipped_by_all_and_leaves_no_trace(hook: str, factor: float) -> None:
    results, expected = run(2, train_spoiled, hook, factor, False), run(2, train_spoiled, hook, factor, True)
    for (skipped, found), (none, reference) in zip(results, expected, strict=True):
        assert (skipped, none) == (1, 0)
        assert torch.equal(found, reference)
        assert torch.equal(found, results[0][1])
        assert found.isfinite().all()


def fit_hooked(hook: str, folder: str, stops_at: int | None, task: Any = None) -> Any:
    return fit(folder, stops_at=stops_at, task=task, strategy=strategy(hook))


@pytest.mark.parametrize("hook", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_interrupted_and_continued_is_uninterrupted_to_the_bit(hook: str, tmp_path: Path) -> None:
    """What is interrupted is a window whose reduction took place."""
    whole = run(3, fit_hooked, hook, str(tmp_path / "whole" / "run"), None)
    parts = str(tmp_path / "parts" / "run")
    for stops_at in (1, 3):
        assert {result[1] for result in run(3, fit_hooked, hook, parts, stops_at)} == {stops_at}
    assert same(run(3, fit_hooked, hook, parts, None), whole)
    assert history(tmp_path / "whole" / "run") == history(tmp_path / "parts" / "run")
