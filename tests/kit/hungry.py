"""Tasks whose memory runs out once in each of some updates: in a forward, or in a backward, on one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine import Trainer
from engine.loss import Loss
from strategies import DDPStrategy, DPStrategy, SingleDeviceStrategy
from tests.kit.reference import Regression, Watch, parameters
from tests.kit.terms import Groups
from tests.kit.tokens import Sequences
from tests.kit.windows import Clip

At = dict[int, tuple[str, int]]
"""By update: in a "forward", a "middle" backward (which is not reduced) or the "last"; and on which process."""


class Noting:
    """Notes whether the micro-batch of the current forward is the last: a mixin of strategies."""

    is_last = False

    def accumulation_context(self, is_last_microbatch: bool) -> Any:
        self.is_last = is_last_microbatch
        return super().accumulation_context(is_last_microbatch)  # type: ignore[misc]


class Single(Noting, SingleDeviceStrategy):
    pass


class DP(Noting, DPStrategy):
    pass


class DDP(Noting, DDPStrategy):
    """Buckets of one parameter, so that some have left when memory runs out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(bucket_cap_mb=1e-4, timeout_seconds=20, **options)


class Hungry:
    """A mixin of tasks: lets memory run out as `at` says, and counts the samples of windows."""

    at: At
    error: Any = torch.OutOfMemoryError("out of memory, as a test wants it")

    def configure_callbacks(self, trainer: Any) -> Any:
        self.trainer, self.at = trainer, dict(self.at)
        return ()

    def eat(self, model: nn.Module) -> None:
        """Raise if this forward is the one; or let the backward that follows raise."""
        phase, rank = self.at.get(self.trainer.update, ("", -1))
        strategy = self.trainer.strategy
        if rank != strategy.rank or (phase != "forward" and (phase == "last") != strategy.is_last):
            return
        del self.at[self.trainer.update]
        if phase == "forward":
            raise self.error
        first = next(model.parameters())  # its gradient comes last: some buckets have left

        def fail(gradient: Tensor) -> None:
            handle.remove()
            raise self.error

        handle = first.register_hook(fail)


class HungryRegression(Hungry, Regression):
    def __init__(self, samples: int, at: At, **options: Any) -> None:
        super().__init__(samples, **options)
        self.at = at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.eat(model)
        return super().loss(model, batch)


class HungrySequences(Hungry, Sequences):
    def __init__(self, samples: int, at: At) -> None:
        super().__init__(samples, masked=range(3))
        self.at = at

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.eat(model)
        return super().loss(model, batch)


class HungryClip(Hungry, Clip):
    def __init__(self, samples: int, at: At) -> None:
        super().__init__(samples)
        self.at = at

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        self.eat(model)
        return super().outputs(model, batch)


class HungryGroups(Hungry, Groups):
    """Memory runs out while process `at` counts the terms of a micro-batch."""

    def __init__(self, samples: int, at: int) -> None:
        super().__init__(samples)
        self.rank, self.at = at, {}

    def weights(self, batch: Any) -> Any:
        if self.trainer.update == 1 and self.trainer.strategy.rank == self.rank:
            self.rank = -1
            raise self.error
        return super().weights(batch)


class TooLarge(HungryRegression):
    """Memory runs out whenever the last process gets more than `most` samples at a time."""

    def __init__(self, samples: int, most: int, **options: Any) -> None:
        super().__init__(samples, {}, **options)
        self.most = most

    def eat(self, model: nn.Module) -> None:
        pass

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        strategy = self.trainer.strategy
        if len(batch[0]) > self.most and strategy.rank == strategy.processes - 1:
            raise self.error
        return super().loss(model, batch)


def fit(task: Any, strategy: Any, N: Any, B: int, epochs: int = 2, **settings: Any) -> tuple[Tensor, list[Any], Any]:
    """Return the parameters, each update's (N, K, samples), and the trainer's facts of a run."""
    watch = Watch()
    trainer = Trainer(
        strategy, micro_batch_size=N, effective_batch_size=B, max_epochs=epochs, callbacks=watch, **settings
    )
    trainer.fit(task)
    records = [(r["micro_batch_size"], r["accumulate_grad_batches"], r["effective_batch"]) for r in watch.records]
    return parameters(trainer.model), records, [str(trial) for trial in trainer.tried]
