"""Replicas that diverge stop the run, and what is uneven between processes neither hangs nor hides an error."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from engine import Accumulator, Callback, Trainer
from strategies import DDPStrategy
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Watch, data, mlp, parameters


def rank() -> int:
    return int(os.environ["RANK"])


def trainer(**options: Any) -> Trainer:
    return Trainer(**{"strategy": "ddp", "micro_batch_size": 4, "max_epochs": 2, **options})


class OneBit(Callback):
    """Changes the last bit of one parameter on one process."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == self.at and rank() == 1:
            weight = trainer.model[0].weight.data
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=weight.dtype))


class FreezesOnOne(Callback):
    """Freezes one parameter on one process, another on the rest if it is told."""

    def __init__(self, at: int, on: int, other: bool) -> None:
        self.at, self.on, self.other = at, on, other

    def on_epoch_start(self, trainer: Any) -> None:
        if trainer.epoch == self.at and (rank() == self.on or self.other):
            trainer.model[0 if rank() == self.on else 2].weight.requires_grad_(False)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(("at", "on"), [(0, 0), (0, 1), (1, 0), (1, 2)])
def test_parameters_frozen_on_one_process_are_an_error_on_all(at: int, on: int, other: bool) -> None:
    def freeze_on_one() -> None:
        task = Regression(32)
        task.model = normed
        trainer(callbacks=FreezesOnOne(at, on, other), accumulate_grad_batches=2).fit(task)

    with pytest.raises(ChildError, match=r"requires_grad of 0\.weight changed: expected the same on all") as raised:
        run(3, freeze_on_one, seconds=20)
    assert len(raised.value.errors) == 3
    assert all("requires_grad of " in text for text in raised.value.errors.values())


@pytest.mark.parametrize("how", ["one bit", "learning rate"])
def test_replicas_that_diverge_stop_the_run_on_all_processes(how: str) -> None:
    def diverge() -> None:
        task = Regression(32)
        callbacks: list[Callback] = [Watch()]
        if how == "one bit":
            callbacks.append(OneBit(2))
        elif how == "learning rate":
            task.lr = 0.1 * (1 + rank())
        trainer(callbacks=callbacks).fit(task)

    with pytest.raises(ChildError, match=r"have diverged: .* on process 0, .* on process 1") as raised:
        run(2, diverge, seconds=30)
    assert len(raised.value.errors) == 2


@pytest.mark.parametrize("unused", [False, True])
def test_a_loss_of_another_model_is_an_error(unused: bool) -> None:
    def go_around() -> None:
        task, net = Regression(32), mlp()
        task.loss = lambda model, batch: nn.functional.mse_loss(net(batch[0]), batch[1])  # type: ignore[method-assign]
        trainer(strategy=DDPStrategy(find_unused_parameters=unused)).fit(task)

    with pytest.raises(ChildError) as raised:
        run(2, go_around, seconds=30)
    assert all("not computed with the `model` that loss" in error for error in raised.value.errors.values())


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


class Twice(Regression):
    """Calls its model twice in each loss, and fails on process 1 where it is told to."""

    fails = False

    def __init__(self, samples: int) -> None:
        super().__init__(samples, model=normed)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        model(batch[0])
        loss = super().loss(model, batch)
        if self.fails and rank() == 1:
            raise KeyError("boom")
        return loss


def fit_twice(fails: bool) -> Any:
    task = Twice(12)  # three micro-batches: process 1 has none in the second window
    task.fails = fails
    run_ = trainer()
    run_.fit(task)
    return parameters(run_.model), run_.model[1].running_mean  # type: ignore[index]


def test_batch_norm_called_twice_with_a_process_without_data() -> None:
    (found, mean), (other, other_mean) = run(2, fit_twice, False, seconds=30)
    assert torch.equal(found, other)
    assert torch.equal(mean, other_mean)


def test_an_error_after_a_forward_with_buffers_reaches_all_processes() -> None:
    with pytest.raises(ChildError) as raised:
        run(2, fit_twice, True, seconds=30)
    assert raised.value.errors[1] == "KeyError: 'boom'"
    assert "process 1 failed in update 0: KeyError" in raised.value.errors[0]


def test_a_second_fit_on_the_same_strategy() -> None:
    @on_processes(2, seconds=30)
    def results() -> Any:
        run_ = trainer(strategy=DDPStrategy(find_unused_parameters=True))
        for _ in range(2):
            run_.fit(Regression(12))
        return parameters(run_.model)

    assert torch.equal(*results)


def test_validation_before_fit() -> None:
    @on_processes(2, seconds=30)
    def losses() -> float:
        task = Regression(9)
        task.validation_data = lambda: TensorDataset(*data(9), torch.arange(9))  # type: ignore[method-assign]
        run_ = trainer()
        before = run_.validate(task)["loss"]
        run_.fit(task)
        assert run_.metrics["loss"] < before
        return before

    assert len(set(losses)) == 1


def test_a_loop_that_skips_backward_is_an_error() -> None:
    def skip_the_last() -> None:
        task, strategy = Regression(32), DDPStrategy()
        strategy.setup()
        model = strategy.prepare(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in Accumulator(strategy, model, optimizer, task.train_data(), 4, 2).windows(0):
            for number, batch in enumerate(window):
                if number == 0:
                    window.backward(task.loss(model, batch))
            window.update()

    with pytest.raises(ChildError, match="backward was not called for a micro-batch"):
        run(2, skip_the_last, seconds=30)


def test_a_loop_that_forgets_the_update_is_an_error() -> None:
    task, strategy = Regression(32), DDPStrategy()
    strategy.setup()
    try:
        model = strategy.prepare(mlp())
        accumulator = Accumulator(strategy, model, torch.optim.SGD(model.parameters()), task.train_data(), 4)
        windows = accumulator.windows(0)
        for batch in (window := next(windows)):
            window.backward(task.loss(model, batch))
        with pytest.raises(ValueError, match=r"without window.update\(\)"):
            next(windows)
    finally:
        strategy.teardown()


def test_every_sampler_that_does_not_share_is_refused() -> None:
    def fit_weighted_loader() -> None:
        task = Regression(8)
        dataset = task.train_data()
        sampler = WeightedRandomSampler(torch.ones(8), 8)
        task.train_data = lambda: DataLoader(dataset, batch_size=2, sampler=sampler)  # type: ignore[method-assign]
        trainer().fit(task)

    with pytest.raises(ChildError, match="each would be trained on once per process"):
        run(2, fit_weighted_loader, seconds=30)


def test_an_effective_batch_of_a_stream_is_refused() -> None:
    task = Regression(8)
    task.train_data = lambda: DataLoader(TensorDataset(task.x), batch_size=2)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="effective_batch_size=4 needs map-style data"):
        Trainer("single", effective_batch_size=4, max_epochs=1).fit(task)


def test_stopping_at_the_end_of_an_epoch_is_at_once() -> None:
    class Stops(Callback):
        def on_epoch_end(self, trainer: Any) -> None:
            trainer.stop()

    run_ = trainer(strategy="single", callbacks=Stops())
    run_.fit(Regression(8))
    assert run_.update == 2


def test_auto_uses_a_group_that_exists() -> None:
    def strategy_name() -> str:
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[variable]
        run_ = trainer(strategy="auto")
        run_.fit(Regression(16))
        return run_.strategy.describe()

    assert run(2, strategy_name) == ["ddp: 2 x cpu, gloo"] * 2
