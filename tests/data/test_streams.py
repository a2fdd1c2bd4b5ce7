"""Streams of ready micro-batches: uneven, empty or of unknown length, they are exact and never hang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from engine import GradientAccumulationScheduler, Trainer
from tests.kit.processes import ChildError, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, Watch, big_batch_run, mlp, parameters
from tests.kit.streams import Stream, Streamed, deal, windows_of


def fit_stream(samples: int, pieces: list[list[list[int]]], scheduling: dict[int, int], epochs: int, model: Any) -> Any:
    count, watch = Count(), Watch()
    callbacks = [count, watch, GradientAccumulationScheduler(scheduling)]
    trainer = Trainer("ddp", micro_batch_size=4, max_epochs=epochs, callbacks=callbacks, gradient_clip_norm=1e9)
    trainer.fit(Streamed(samples, pieces, model=model))
    return parameters(trainer.model), watch.records, count.counts


LENGTHS = [[5], [5, 4], [7, 2], [5, 1, 0], [0, 1], [3, 3, 3, 3], [1, 0, 0, 9]]
SCHEDULES = ({0: 1}, {0: 3}, {0: 8, 1: 2, 2: 1})


@pytest.mark.parametrize("sizes", [[4], [3, 5, 1, 2]], ids=["even", "ragged"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_uneven_streams_equal_one_big_batch(lengths: list[int], sizes: list[int]) -> None:
    pieces = deal(lengths, sizes)
    samples = sum(len(piece) for own in pieces for piece in own)
    results = run(len(lengths), lambda: [fit_stream(samples, pieces, scheduling, 3, mlp) for scheduling in SCHEDULES])
    for scheduling, *replicas in zip(SCHEDULES, *results, strict=True):
        Ks = [scheduling[max(f for f in scheduling if f <= epoch)] for epoch in range(3)]
        epochs = [windows_of(pieces, K) for K in Ks]
        reference = big_batch_run(Regression(samples), epochs)
        for found, records, counts in replicas:
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
            assert [r["effective_batch"] for r in records] == [len(rows) for epoch in epochs for rows in epoch]
            assert records[-1]["samples"] == 3 * samples
            expected = {"allreduce_": 1, "allgather_": 1} if len(lengths) > 1 else {"allreduce_": 1}
            for update, before, record in zip(counts[1:], records, records[1:], strict=False):
                if before["epoch"] == record["epoch"]:  # the start of an epoch asks once more
                    assert update == expected


def test_a_dataloader_is_a_stream() -> None:
    class Loaded(Regression):
        def train_data(self) -> Any:
            return DataLoader(TensorDataset(self.x, self.y, torch.arange(len(self.x))), batch_size=3)

    trainer = Trainer("single", accumulate_grad_batches=4, max_epochs=2)
    trainer.fit(Loaded(31))
    windows = [list(range(start, min(start + 12, 31))) for start in range(0, 31, 12)]
    reference = big_batch_run(Regression(31), [windows] * 2)
    torch.testing.assert_close(parameters(trainer.model), reference, rtol=0, atol=1e-12)


def test_set_epoch_is_called() -> None:
    class Epochs(Stream):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    task = Streamed(8, deal([2], [4]))
    task.train_data = lambda: Epochs(task, task.pieces[0])  # type: ignore[method-assign]
    Trainer("single", max_epochs=3).fit(task)
    assert Epochs.epochs == [0, 1, 2]


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_last_record_has_its_own_epoch_if_nobody_listens(is_stream: bool) -> None:
    task = Regression(20)
    if is_stream:
        loader = DataLoader(task.train_data(), 4)
        task.train_data = lambda: loader  # type: ignore[method-assign]
    trainer = Trainer(micro_batch_size=4, max_epochs=2)
    trainer.fit(task)
    assert (trainer.record["update"], trainer.record["epoch"]) == (10, 1)


def test_a_stream_is_bounded_by_updates_too() -> None:
    trainer = Trainer("single", max_updates=7)
    trainer.fit(Streamed(12, deal([3], [4])))
    assert (trainer.update, trainer.epoch, trainer.samples) == (7, 2, 28)


# Bad input


class Breaks(Streamed):
    def train_data(self) -> Any:
        task, rank = self, dist.get_rank()

        def read() -> Iterator[Any]:
            for number, batch in enumerate(Stream(task, task.pieces[rank])):
                if rank == 1 and number == task.breaks_at:
                    raise OSError("the disk is gone")
                yield batch

        return type("Reader", (), {"__iter__": lambda self: read()})()


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("breaks_at", [0, 1, 4])
def test_a_stream_that_raises_stops_all_processes_and_names_the_rank(breaks_at: int, K: int) -> None:
    def fit_breaking() -> None:
        task = Breaks(60, deal([5, 5, 5], [4]))
        task.breaks_at = breaks_at
        Trainer("ddp", accumulate_grad_batches=K, max_epochs=1).fit(task)

    with pytest.raises(ChildError) as raised:
        run(3, fit_breaking, seconds=20)
    assert raised.value.errors[1] == "OSError: the disk is gone"
    for rank in (0, 2):
        assert "process 1 failed in update" in raised.value.errors[rank]
        assert "OSError: the disk is gone" in raised.value.errors[rank]


def test_streams_that_are_all_empty_are_an_error() -> None:
    with pytest.raises(ChildError, match="no micro-batch in epoch 0, on any process"):
        run(2, lambda: Trainer("ddp", max_epochs=1).fit(Streamed(1, [[], []])), seconds=20)


def test_a_generator_that_is_spent_is_an_error() -> None:
    task = Streamed(8, deal([2], [4]))
    generator = iter(Stream(task, task.pieces[0]))
    task.train_data = lambda: generator  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no micro-batch in epoch 1.*Is it a generator"):
        Trainer("single", max_epochs=2).fit(task)


def test_a_batch_whose_size_cannot_be_told_says_what_to_write() -> None:
    task = Streamed(8, deal([2], [4]))
    task.train_data = lambda: type("Odd", (), {"__iter__": lambda self: iter(["text"])})()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"give Streamed a method batch_size\(self, batch\)"):
        Trainer("single", max_epochs=2).fit(task)


def test_an_iterable_dataset_of_samples_is_refused() -> None:
    class Items(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield 1

    task = Regression(8)
    task.train_data = Items  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="DataLoader"):
        Trainer("single", max_epochs=1).fit(task)


def test_a_loader_that_gives_all_samples_to_all_processes_is_refused() -> None:
    def fit_shared_loader() -> None:
        task = Regression(8)
        task.train_data = lambda: DataLoader(TensorDataset(task.x), batch_size=2, shuffle=True)  # type: ignore[method-assign]
        Trainer("ddp", max_epochs=1).fit(task)

    with pytest.raises(ChildError, match="each would be trained on once per process"):
        run(2, fit_shared_loader, seconds=20)


class Restored(Stream):
    """A stream with a state, which may be restored wrongly."""

    how = "right"
    first = next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["next"] + (self.how == "drops one")

    def __iter__(self) -> Iterator[Any]:
        self.next, first = self.first, self.first
        if self.how != "begins there again":
            self.first = 0
        for batch in list(super().__iter__())[first:]:
            self.next += 1
            yield batch
        self.next = 0


def fit_restored(how: str, run_dir: str, max_updates: int) -> int:
    task = Streamed(24, deal([6], [4]))
    task.train_data = lambda: Restored(task, task.pieces[0])  # type: ignore[method-assign]
    Restored.how = how
    trainer = Trainer("single", accumulate_grad_batches=2, max_epochs=3, max_updates=max_updates, run_dir=run_dir)
    trainer.fit(task)
    return trainer.samples


@pytest.mark.parametrize(
    ("how", "samples", "told"),
    [
        ("right", 72, []),
        ("begins there again", 64, ["read 4 micro-batches in epoch 2 and 6 in the epoch before"]),
        ("drops one", 68, ["read 5 micro-batches in epoch 1 and 6", "read 6 micro-batches in epoch 2 and 5"]),
    ],
)
def test_a_restored_stream_that_loses_samples_is_told(
    how: str, samples: int, told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_restored(how, str(tmp_path / "run"), 4)  # stops in the second epoch
    assert fit_restored(how, str(tmp_path / "run"), 99) == samples
    found = [record.getMessage() for record in caplog.records if "load_state_dict" in record.getMessage()]
    assert len(found) == len(told)
    assert all(text in message for text, message in zip(told, found, strict=True))
