"""Sample counts: a mean is weighted by the samples of its batch, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from engine import Loss, Trainer
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Samples, Watch, big_batch_run, in_order, parameters


def kept(index: int) -> bool:
    return index % 3 != 0


class Leaves(Regression):
    """Its `collate` leaves each third sample out."""

    def train_data(self) -> Any:
        return Samples(self.x, self.y)

    def validation_data(self) -> Any:
        return Samples(self.x, self.y)

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if kept(sample[2])])


class Counts(Leaves):
    def batch_size(self, batch: Any) -> int:
        return len(batch[0])


class Weighs(Leaves):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return Loss(super().loss(model, batch) * len(batch[0]), len(batch[0]))


def fit(task: type[Regression], strategy: str = "ddp", workers: int = 0) -> Any:
    watch = Watch()
    trainer = Trainer(
        strategy,
        micro_batch_size=4,
        accumulate_grad_batches=2,
        max_epochs=2,
        shuffle=False,
        callbacks=watch,
        num_workers=workers,
    )
    trainer.fit(task(31))
    return parameters(trainer.model), trainer.metrics, [record["samples"] for record in watch.records]


@pytest.mark.parametrize("task", [Counts, Weighs])
@pytest.mark.parametrize("P", [1, 2])
def test_samples_that_collate_leaves_out_have_no_weight(P: int, task: type[Regression]) -> None:
    windows = [[row for row in window if kept(row)] for window in in_order(31, 8 * P)]
    reference = big_batch_run(Regression(31), [windows] * 2)
    for found, metrics, samples in run(P, fit, task):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert samples[-1] == (2 * 20 if task is Counts else 2 * 31)
        x, y = (values[[row for row in range(31) if kept(row)]] for values in (Regression(31).x, Regression(31).y))
        model = Regression(31).configure_model()
        nn.utils.vector_to_parameters(reference, model.parameters())
        assert metrics["loss"] == pytest.approx(nn.functional.mse_loss(model(x), y).item(), abs=1e-12)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mean_over_unknown_samples_asks_for_their_number(workers: int) -> None:
    with pytest.raises(ValueError, match=r"made of 4 samples has 2 rows .* Give Leaves a method batch_size\(self, b"):
        fit(Leaves, "single", workers)


def test_a_metric_over_unknown_samples_asks_too() -> None:
    with pytest.raises(ValueError, match=r"made of 4 samples has 2 rows"):
        Trainer("single", micro_batch_size=4, max_epochs=1).validate(Leaves(31))


class Short(Samples):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices if kept(index)]


def test_a_dataset_that_returns_fewer_samples_is_refused() -> None:
    task = Regression(31)
    task.train_data = lambda: Short(task.x, task.y)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"__getitems__ returned 2 samples for 4 indices"):
        Trainer("single", micro_batch_size=4, max_epochs=1, shuffle=False).fit(task)


SEQUENCES = [torch.ones(length, 2) for length in (4, 3, 2)]
RAGGED = {
    "packed": pack_sequence(SEQUENCES),
    "packed in a list": [pack_sequence(SEQUENCES), torch.zeros(3)],
    "nested": torch.nested.nested_tensor(SEQUENCES),
    "jagged": torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged),
    "jagged in a list": [torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged), torch.zeros(3)],
}


class Ragged(Dataset[Any]):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return index


class OneWeight(Regression):
    """A loss that needs no data."""

    def __init__(self, batch: Any, is_stream: bool) -> None:
        super().__init__(3, model=lambda: nn.Linear(1, 1))
        self.batch, self.is_stream = batch, is_stream

    def train_data(self) -> Any:
        return iter([self.batch]) if self.is_stream else Ragged(self.batch)

    def collate(self, samples: list[Any]) -> Any:
        return self.batch

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(torch.ones(1)).square().sum()


@pytest.mark.parametrize("is_stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("name", RAGGED)
def test_packed_and_nested_tensors_are_counted_by_sequences(name: str, is_stream: bool) -> None:
    trainer = Trainer("single", micro_batch_size=3, max_epochs=1)
    trainer.fit(OneWeight(RAGGED[name], is_stream))
    assert (trainer.samples, trainer.weight) == (3, 3)


def test_a_stream_whose_tensors_disagree_asks_for_the_number() -> None:
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], torch.zeros(2)  # dim 0 of the first tensor: channels
    with pytest.raises(ValueError, match=r"a micro-batch has 3 and 2 rows in its tensors.* Give OneWeight a method"):
        Trainer("single", max_epochs=1).fit(OneWeight(images, is_stream=True))


class Loaded(Regression):
    """A DataLoader whose batch sampler gives each process its own micro-batches, or, if `is_shared`, all."""

    def __init__(self, is_shared: bool) -> None:
        super().__init__(32)
        self.is_shared = is_shared

    def train_data(self) -> Any:
        rank, P = (0, 1) if self.is_shared else (dist.get_rank(), dist.get_world_size())
        rows = [[row, row + 1] for row in range(0, 32, 2)][rank::P]
        batches = type("Mine", (), {"__iter__": lambda self: iter(rows), "__len__": lambda self: len(rows)})()
        return DataLoader(TensorDataset(self.x, self.y, torch.arange(32)), batch_sampler=batches)


def fit_loaded(is_shared: bool) -> Any:
    trainer = Trainer("ddp", accumulate_grad_batches=2, max_epochs=1)
    trainer.fit(Loaded(is_shared))
    return parameters(trainer.model), trainer.samples


def test_a_batch_sampler_of_ones_own_shares_the_samples() -> None:
    windows = [range(start, start + 8) for start in range(0, 32, 8)]
    for found, samples in run(2, fit_loaded, False):
        torch.testing.assert_close(found, big_batch_run(Regression(32), [windows]), rtol=0, atol=1e-12)
        assert samples == 32


def test_the_same_stream_on_all_processes_is_refused() -> None:
    with pytest.raises(ChildError) as raised:
        run(3, fit_loaded, True, seconds=20)
    assert len(raised.value.errors) == 3
    for error in raised.value.errors.values():
        assert "processes 0 and 1 read the same micro-batches: each sample would be trained on more" in error


class BeginsLong(Loaded):
    """Each process has its own samples, which begin with the same 2,000 numbers."""

    def train_data(self) -> Any:
        prompt = torch.arange(2000.0, dtype=torch.float64).expand(2, -1)
        batches = super().train_data()
        return [(torch.cat([prompt, x], 1), torch.cat([prompt, y], 1)) for x, y, _ in batches].__iter__()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(model(batch[0][:, 2000:]), batch[1][:, 2000:])


def test_streams_whose_samples_begin_alike_are_not_refused() -> None:
    @on_processes(2)
    def samples() -> int:
        trainer = Trainer("ddp", max_epochs=1)
        trainer.fit(BeginsLong(False))
        return trainer.samples

    assert samples == [32, 32]


class Constant(Regression):
    def train_data(self) -> Any:
        same = [torch.zeros(4, 5).double(), torch.zeros(4, 1).double(), torch.zeros(4)]
        return [same, same].__iter__()  # two windows: equal streams are refused in the second


def test_micro_batches_that_may_be_equal_by_chance_are_not_refused() -> None:
    @on_processes(2)
    def samples() -> int:
        trainer = Trainer("ddp", max_epochs=1)
        trainer.fit(Constant(4))
        return trainer.samples

    assert samples == [16, 16]


class BeginsAlike(Loaded):
    """As environments that are reset do: only the first micro-batch is the same on all processes."""

    def train_data(self) -> Any:
        return [next(iter(Loaded(True).train_data())), *super().train_data()].__iter__()


def test_streams_that_only_begin_alike_are_not_refused() -> None:
    @on_processes(2)
    def samples() -> int:
        trainer = Trainer("ddp", accumulate_grad_batches=2, max_epochs=1)
        trainer.fit(BeginsAlike(False))
        return trainer.samples

    assert samples == [36, 36]
