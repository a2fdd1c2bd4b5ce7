"""Logged values: exact means over a window or a validation and all processes; wrong names end all at once."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Accumulator, Callback, Loss, Trainer
from strategies import DPStrategy, PipelineStrategy, resolve
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, Samples, Watch, in_order
from tests.kit.streams import Stream

SAMPLES, N, B = 22, 2, 12


class Logs(Regression):
    """Logs means of several weights; the second window of an epoch is short, and leaves processes without data."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, index = batch
        is_large = x[:, 0] > 0.5
        self.log("both", x[:, 1].mean())  # a pipeline's first process comes no further than the model
        loss = nn.functional.mse_loss(model(x), y)
        self.seen += [index.tolist()] if torch.is_grad_enabled() else []
        self.log("loss_again", loss)
        self.log("first", x[:, 0].mean())
        self.log("both", x[:, 0].mean())
        self.log("large", x[is_large, 1].mean(), is_large.sum())  # NaN with weight 0 where there is none
        self.log("host", float(len(x)))
        self.log("weighted_by_host", 2.0, 3)
        return loss

    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])


def strategy_of(name: str, K: int) -> Any:
    made = {"dp": lambda: DPStrategy(2, "cpu"), "pipeline": lambda: PipelineStrategy(micro_batches=K, schedule="GPipe")}
    return made[name]() if name in made else name


def expected(rows: range | list[int]) -> dict[str, float]:
    x = Logs(SAMPLES).x[list(rows)]
    large = x[x[:, 0] > 0.5]
    means = {"first": x[:, 0].mean().item(), "both": x[:, :2].mean().item(), "weighted_by_host": 2.0}
    return {**means, "large": large[:, 1].mean().item()} if len(large) else means


CASES = [("single", 1, 6), ("dp", 1, 6), *(("ddp", P, 6 // P) for P in (1, 2, 3)), ("ddp", 4, 2), ("fsdp", 2, 3)]


@pytest.mark.parametrize(("strategy", "P", "K"), [*CASES, ("pipeline", 2, 6), ("pipeline", 4, 3)])
def test_means_are_exact_over_windows_and_processes(strategy: str, P: int, K: int) -> None:
    size = N * K * (P // 2 if strategy == "pipeline" else P)
    windows = [*in_order(SAMPLES, size), *in_order(SAMPLES, size)]

    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        trainer = Trainer(strategy_of(strategy, K), N, K, max_epochs=2, shuffle=False, callbacks=watch)
        trainer.fit(Logs(SAMPLES))
        return watch.records, trainer.metrics

    for records, metrics in results:
        assert len(records) == len(windows)
        for record, rows in zip(records, windows, strict=True):
            for name, value in expected(rows).items():
                assert record[name] == pytest.approx(value, rel=1e-12)
            assert ("large" in record) == ("large" in expected(rows))
            assert record["loss_again"] == pytest.approx(record["loss"], rel=1e-12)
        for name, value in expected(range(7)).items():
            assert metrics[name] == pytest.approx(value, rel=1e-12)
        assert metrics["loss_again"] == pytest.approx(metrics["loss"], rel=1e-12)


class Streams(Logs):
    """Streams of 5, 1 and no micro-batches."""

    def train_data(self) -> Any:
        count = (5, 1, 0)[torch.distributed.get_rank()]
        return Stream(self, [[start, start + 1] for start in range(0, 2 * count, 2)])

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, (batch["x"], *batch["nested"]) if isinstance(batch, dict) else batch)


def test_processes_without_data_take_part() -> None:
    @on_processes(3)
    def results() -> Any:
        watch, task = Watch(), Streams(SAMPLES)
        Trainer("ddp", accumulate_grad_batches=2, max_epochs=2, callbacks=watch).fit(task)
        return watch.records, watch.samples

    for update, records in enumerate(zip(*(records for records, _ in results), strict=True)):
        rows = [index for _, samples in results for index in samples[update]]
        for record in records:
            for name, value in expected(rows).items():
                assert record[name] == pytest.approx(value, rel=1e-12)


class Later(Logs):
    """Logs a name from the second window on, on the last process only."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        if batch[2].min() >= 8 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self.log("late", batch[0][:, 2].mean())
        return super().loss(model, batch)


def test_a_later_name_is_taken_from_whoever_has_it_and_agreed_on_once() -> None:
    x = Logs(SAMPLES).x

    @on_processes(2)
    def results() -> Any:
        watch = Count()
        Trainer("ddp", N, accumulate_grad_batches=2, max_updates=3, callbacks=watch, shuffle=False).fit(Later(SAMPLES))
        return watch.records, watch.counts

    for records, counts in results:
        assert [("late" in record) for record in records] == [False, True, True]
        for record, rows in zip(records[1:], ([10, 11, 14, 15], [18, 19]), strict=True):  # of the second process
            assert record["late"] == pytest.approx(x[rows, 2].mean().item(), rel=1e-12)
        # the first two windows agree on names, each in one gather: up to process 0, and two broadcasts
        assert [count["allgather_"] for count in counts] == [1, 1, 1]
        assert [count.get("broadcast_", 0) for count in counts] == [2, 2, 0]


class Rare(Regression):
    """Logs nothing in the first window, and later on one process only."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 3 and torch.distributed.get_rank() == 1:
            self.log("rare", 1.0)
        return super().loss(model, batch)


def test_the_first_name_may_come_late_and_on_one_process() -> None:
    def fit_it() -> Any:
        watch = Watch()
        Trainer("ddp", N, accumulate_grad_batches=1, max_epochs=1, callbacks=watch).fit(Rare(SAMPLES))
        return [record.get("rare") for record in watch.records]

    assert run(2, fit_it) == [[None, None, 1.0, None, None, None]] * 2


class ByRank(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log(f"loss_{torch.distributed.get_rank()}", 1.0)
        return super().loss(model, batch)


class Taken(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("lr", 1.0)
        return super().loss(model, batch)


class Column(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("train/loss", 1.0)
        return super().loss(model, batch)


class Columns(Logs):  # the column of `first`, which Logs has
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("train/first", 1.0)
        return super().loss(model, batch)


TAKEN = "records, or tables made of them, have a field of that name. Use another name"


class Shaped(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("first", batch[0][:, 0], 1)
        return super().loss(model, batch)


class Negative(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("first", 1.0, -1)
        return super().loss(model, batch)


class Twice(Logs):
    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        self.log("loss", 1.0)
        return {"loss": Loss(torch.ones(()), 1)}


class Named(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("two\nlines", 1.0)
        return super().loss(model, batch)


class Weighted(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.log("first", 1.0, torch.ones(2))
        return super().loss(model, batch)


class Evaluated(Logs):
    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"first": Loss(torch.ones(()), -1)}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ByRank, "the processes have logged different names in their first window: 'loss_0', .*; 'loss_1', .*weight=0"),
        (Taken, rf"self.log\('lr', ...\): {TAKEN}"),
        (Column, rf"self.log\('train/loss', ...\): {TAKEN}"),
        (Columns, rf"self.log\('train/first', ...\): {TAKEN}"),
        (Shaped, r"self.log\('first', ...\) was given a tensor of shape \(2,\): expected a number or a 0-dim tensor"),
        (Negative, r"self.log\('first', weight=-1.0\): expected a finite number of at least 0"),
        (Named, r"self.log\('two\\nlines', ...\): expected a name of printable characters"),
        (Weighted, r"self.log\('first', ...\) was given a tensor of shape \(2,\): expected a number or a 0-dim tensor"),
        (Evaluated, r"self.log\('first', weight=-1.0\): expected a finite number of at least 0"),
        (Twice, "evaluate.. has both returned and logged 'loss'. Do one of them"),
    ],
)
def test_what_cannot_be_recorded_ends_all_processes(task: Any, message: str) -> None:
    def fit_it() -> None:
        Trainer("ddp", N, max_updates=2, callbacks=Watch()).fit(task(SAMPLES))

    with pytest.raises(ChildError, match=message) as caught:
        run(2, fit_it)
    assert {*caught.value.errors} == {0, 1}
    assert not any("timed out" in text for text in caught.value.errors.values())


def fit_own_loop(K: int) -> Any:
    task, strategy = Logs(SAMPLES), resolve("auto")
    strategy.setup()
    model = strategy.prepare(task.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(strategy, model, optimizer, task.train_data(), N, K, shuffle=False)
    outcomes = []
    for window in accumulator.windows(0):
        for x, y, _ in window:
            loss = nn.functional.mse_loss(model(x), y)
            window.log("first", x[:, 0].mean())
            window.backward(loss)
        outcomes.append(window.update())
    for window in accumulator.windows(1):
        for x, y, _ in window:
            window.backward(nn.functional.mse_loss(model(x), y))
            with pytest.raises(ValueError, match=r"log\('first', ...\) was called after backward"):
                window.log("first", x[:, 0].mean())
            return [outcome.metrics for outcome in outcomes]
    return None


@pytest.mark.parametrize("P", [1, 2])
def test_own_loops_log_too(P: int) -> None:
    windows = in_order(SAMPLES, B)
    for metrics in run(P, fit_own_loop, B // N // P):
        assert [m["first"] for m in metrics] == pytest.approx([expected(rows)["first"] for rows in windows], rel=1e-12)


class Interrupts(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == self.at:
            trainer._signals.stop_requested = trainer._signals.stop_requested or trainer.strategy.rank == 0


def fit_in_parts(folder: str, interrupted_at: int) -> Any:
    watch = Watch()
    options = {"run_dir": folder, "callbacks": [watch, Interrupts(interrupted_at)], "shuffle": False}
    task = Logs(SAMPLES) if int(os.environ["WORLD_SIZE"]) == 1 else Later(SAMPLES)
    Trainer("auto", N, accumulate_grad_batches=2, max_epochs=2, **options).fit(task)
    return watch.records


@pytest.mark.parametrize("P", [1, 2])
def test_a_dropped_window_is_not_counted_and_a_resumed_run_logs_on(P: int, tmp_path: Path) -> None:
    whole = run(P, fit_in_parts, str(tmp_path / "whole"), 0)
    first = run(P, fit_in_parts, str(tmp_path / "parts"), 2)
    second = run(P, fit_in_parts, str(tmp_path / "parts"), 0)
    for records, before, after in zip(whole, first, second, strict=True):
        assert 0 < len(before) < len(records)
        for record, again in zip(records, before + after, strict=True):
            assert {name: again[name] for name in record if name != "samples_per_second"} == {
                name: record[name] for name in record if name != "samples_per_second"
            }


class Overflows(Logs):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch) * (math.inf if 0 in batch[2] else 1.0)


def test_a_skipped_update_has_its_means() -> None:
    watch = Watch()
    Trainer(micro_batch_size=N, accumulate_grad_batches=6, max_epochs=1, shuffle=False, callbacks=watch).fit(
        Overflows(SAMPLES)
    )
    assert [record["skipped"] for record in watch.records] == [1, 1]
    assert watch.records[0]["first"] == pytest.approx(expected(range(12))["first"], rel=1e-12)


class Compiled(Logs):
    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.forward = torch.compile(self.step, backend="eager")

    def step(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        self.log("first", x[:, 0].mean())
        return nn.functional.mse_loss(out, y)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self.forward(model, *batch[:2])


def test_a_compiled_loss_logs() -> None:
    watch = Watch()
    Trainer(micro_batch_size=N, accumulate_grad_batches=6, max_epochs=1, shuffle=False, callbacks=watch).fit(
        Compiled(SAMPLES)
    )
    firsts = [record["first"] for record in watch.records]
    assert firsts == pytest.approx([expected(rows)["first"] for rows in in_order(SAMPLES, B)], rel=1e-12)


def test_the_device_is_read_once_a_window_however_long(tmp_path: Path) -> None:
    looks = {}
    for K in (2, 8):
        watch = Count()
        Trainer(micro_batch_size=1, accumulate_grad_batches=K, max_updates=2, callbacks=watch).fit(Logs(SAMPLES))
        looks[K] = watch.looks
    assert looks[2] == looks[8]


def test_nobody_listens_and_the_last_record_is_there() -> None:
    task = Logs(SAMPLES)
    trainer = Trainer(micro_batch_size=N, accumulate_grad_batches=6, max_epochs=1, shuffle=False)
    trainer.fit(task)
    assert trainer.record["first"] == pytest.approx(expected(range(12, 22))["first"], rel=1e-12)
    assert trainer.record["loss"] == pytest.approx(trainer.record["loss_again"], rel=1e-12)
    assert trainer.record["update"] == 2
    task.log("after", 1.0)  # outside of a run
    assert task._log_entries is None
