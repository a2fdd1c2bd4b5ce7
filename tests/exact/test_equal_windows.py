"""A forward that communicates, as SyncBatchNorm's does: exact where windows are equal, refused where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Accumulator, Trainer
from strategies import DDPStrategy
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, parameters


class SumOverProcesses(torch.autograd.Function):
    """An all-reduce whose backward is one too, as in SyncBatchNorm (which runs on GPUs only)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class Centred(nn.Module):
    """Subtracts the mean over the micro-batches that all processes have at a time."""

    def __init__(self, communicates: bool = True) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
        self.out = nn.Linear(4, 1).double()
        self.communicates = communicates

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        total = SumOverProcesses.apply(h.sum(0)) / dist.get_world_size() if self.communicates else h.sum(0)
        return self.out(h - total / len(x))


class Together(DDPStrategy):
    needs_equal_windows = True


def fit(samples: int, spread: bool = False) -> Any:
    trainer = Trainer(
        Together(), micro_batch_size=4, accumulate_grad_batches=2, max_epochs=2, shuffle=False, spread_windows=spread
    )
    trainer.fit(Regression(samples, model=Centred))
    return parameters(trainer.model)


def test_equal_windows_are_exact() -> None:
    task = Regression(32, model=lambda: Centred(communicates=False))
    torch.manual_seed(0)
    model = task.model()
    for _ in range(2):
        for window in (range(16), range(16, 32)):
            both = [window[:8], window[8:]]  # what two processes have at a time is normalised together
            loss = sum(nn.functional.mse_loss(model(task.x[list(b)]), task.y[list(b)]) for b in both) / 2
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= task.lr * g
    for found in run(2, fit, 32, seconds=30):
        torch.testing.assert_close(found, parameters(model), rtol=0, atol=1e-12)


def test_windows_that_are_not_equal_are_refused_and_can_be_spread() -> None:
    with pytest.raises(ChildError, match="in epoch 0 an update of 12 samples is 3 micro-batches on 2 proc"):
        run(2, fit, 28, seconds=30)
    first, second = run(2, fit, 28, True, seconds=30)
    assert torch.equal(first, second)


def test_streams_are_refused() -> None:
    def fit_stream() -> None:
        task = Regression(32, model=Centred)
        task.train_data = lambda: iter([])  # type: ignore[method-assign]
        Trainer(Together(), max_epochs=1).fit(task)

    with pytest.raises(ChildError, match="ready micro-batches may run out on one process before another"):
        run(2, fit_stream, seconds=30)


def test_a_loop_of_one_s_own_is_told_too() -> None:
    def own_loop() -> None:
        strategy = Together()
        strategy.setup()
        model = strategy.prepare(Centred())
        data = Regression(28).train_data()
        Accumulator(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), data, 4, {0: 1, 3: 2})

    with pytest.raises(ChildError, match="in epoch 0 an update of 4 samples is 1 micro-batches on 2 processes"):
        run(2, own_loop, seconds=30)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), nn.SyncBatchNorm(4), nn.Linear(4, 1))
        self.double()


def needs() -> bool:
    strategy = DDPStrategy()
    strategy.setup()
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        strategy.prepare(Normed())
    return strategy.needs_equal_windows


def test_a_sync_batch_norm_is_noticed() -> None:
    assert run(2, needs) == [True, True]
    assert run(1, needs) == [False]
