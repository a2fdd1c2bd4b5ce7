"""A skipped update leaves parameters, optimizer state, buffers and averaged weights as they were, on every strategy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Loss, Trainer
from engine.callbacks import EMA
from strategies import Strategy
from strategies.registry import find
from tests.kit.buffers import PLACES, every_kind
from tests.kit.processes import run
from tests.kit.reference import Regression


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5).double()), nn.Linear(5, 1).double())


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


class Poisoned(Regression):
    """Sample 12 is NaN; the samples of the sixth window have weight 0."""

    def __init__(self, model: Any) -> None:
        super().__init__(32, model=model)
        self.x[12] = math.nan

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, index = batch
        weight = (index // 4 != 5).double()[:, None]
        return Loss(((model(x) - y).square() * weight).sum(), weight.sum())


class Unchanged(Callback):
    """Compares the state after a skipped update with that before it."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.skipped: list[int] = []

    def on_fit_start(self, trainer: Any) -> None:
        self.before = self.state(trainer)

    def state(self, trainer: Any) -> dict[str, Any]:
        model = trainer.strategy._model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        moments = {f"{i}.{k}": v for i, s in enumerate(trainer.optimizer.state.values()) for k, v in s.items()}
        averages = {f"average {name}": value for name, value in self.ema.averages.items()}
        everything = {**tensors, **moments, **averages}
        return {n: getattr(t, "_local_tensor", t).detach().clone() for n, t in everything.items() if not t.is_meta}

    def on_update_end(self, trainer: Any) -> None:
        after = self.state(trainer)
        if trainer.skipped > len(self.skipped):
            self.skipped.append(trainer.update)
            assert {n: t.tolist() for n, t in after.items()} == {n: t.tolist() for n, t in self.before.items()}
        else:
            assert any(not torch.equal(after[name], self.before[name]) for name in self.before)
        self.before = after


def fit(strategy: Strategy, model: Any) -> list[int]:
    ema = EMA(0.9)
    unchanged = Unchanged(ema)
    callbacks = [ema, unchanged] if strategy.holds_model else unchanged
    K = strategy.micro_batches or 1
    N = 4 // strategy.data_parallel_size // K
    Trainer(
        strategy, micro_batch_size=N, accumulate_grad_batches=K, max_epochs=1, shuffle=False, callbacks=callbacks
    ).fit(Poisoned(model))
    return unchanged.skipped


@pytest.mark.parametrize("model", [batch_norm, spectral, every_kind])
@pytest.mark.parametrize(("name", "options", "P"), PLACES, ids=[place[0] for place in PLACES])
def test_a_skipped_update_changes_nothing(name: str, options: dict[str, Any], P: int, model: Any) -> None:
    assert run(P, lambda: fit(find(name)(**options), model), group=P > 1) == [[4, 6]] * P
