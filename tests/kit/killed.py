"""A run with all that a checkpoint must know of, killed at named moments, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import Callback, GradientAccumulationScheduler, Loss, Task, Trainer
from strategies import DDPStrategy
from tests.kit.reference import Samples, data

SAMPLES, N = 23, 2


SCHEDULING = {0: 3, 1: 1, 2: 2}


class Full(Task):
    """Everything that a checkpoint must know of: late weights, dropout, a schedule of the learning rate, validation."""

    def __init__(self, normalises: bool = True, adaptive: bool = True, streams: Any = None) -> None:
        self.x, self.y = data(SAMPLES)
        self.weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.normalises, self.adaptive, self.streams = normalises, adaptive, streams
        self.seen: list[int] = []

    def configure_model(self) -> nn.Module:
        norm = nn.BatchNorm1d(8) if self.normalises else nn.Identity()
        return nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        if not self.adaptive:
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        total = (self.total_updates or 20) + 1
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total)

    def train_data(self) -> Any:
        return Samples(self.x, self.y) if self.streams is None else self.streams

    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y, index = batch
        self.seen += index.tolist()
        weights = self.weights[index]
        x = torch.cat([x, x.mean(0, keepdim=True)])  # BatchNorm wants two
        errors = (model(x)[:-1] - y)[:, 0] ** 2
        return Loss((errors * weights).sum(), weights.sum())


class Witness(Callback):
    """Writes which samples each update saw, and has a state of its own."""

    def __init__(self, folder: str, stops_at: int | None = None) -> None:
        self.folder, self.stops_at, self.sum = Path(folder), stops_at, 0.0

    def on_fit_start(self, trainer: Any) -> None:
        trainer.task.seen.clear()
        self.file = (self.folder.parent / f"seen-{trainer.strategy.rank}").open("a", buffering=1)

    def on_update_end(self, trainer: Any) -> None:
        self.file.write(json.dumps([trainer.update, trainer.epoch, trainer.task.seen]) + "\n")
        trainer.task.seen.clear()
        self.sum += trainer.record["loss"]
        if trainer.update == self.stops_at and trainer.strategy.rank == trainer.strategy.data_parallel_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"]


class Dies(DDPStrategy):
    """Is killed as one process, at the first time of a named moment from the n-th window of this start on."""

    def __init__(self, kill: tuple[int, int, str] | None) -> None:
        super().__init__(timeout_seconds=20, bucket_cap_mb=1e-4)
        self._kill, self._window = kill, -1

    def at(self, moment: str) -> None:
        rank, window, killing = self._kill or (-1, 0, "")
        if moment == killing and rank == self.rank and window <= self._window:
            os.kill(os.getpid(), signal.SIGKILL)

    def run_window(self, window: Any, forward: Any) -> None:
        self._window += 1

        def watched(micro: Any) -> Any:
            self.at("forward")
            return forward(micro)

        super().run_window(window, watched)
        self.at("after reduce")

    def backward(self, loss: Tensor, scale: Any) -> None:
        if self._ddp.require_backward_grad_sync:
            self.at("before reduce")
            first = next(self._model.parameters())  # its gradient comes last: other buckets are under way
            first.register_hook(lambda gradient: self.at("in reduce"))
        super().backward(loss, scale)

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        norm = super().clip(max_norm, factor)
        self.at("before step")
        return norm

    def clear_gradients(self) -> None:
        self.at("after step")
        super().clear_gradients()
        self.at("boundary")

    def fingerprint(self) -> int:
        self.at("before save")
        return super().fingerprint()

    def collect(self, value: Any) -> list[Any]:
        self.at("gather")
        return super().collect(value)

    def state_dict(self, optimizer: Any = None) -> dict[str, Any]:
        self.at("in save")
        return super().state_dict(optimizer)

    def synchronize_buffers(self, model: nn.Module) -> None:
        self.at("validation")
        super().synchronize_buffers(model)


def fit(folder: str, kill: Any = None, stops_at: int | None = None, task: Any = None, strategy: Any = None) -> Any:
    witness = Witness(folder, stops_at)
    trainer = Trainer(
        strategy or Dies(kill),
        micro_batch_size=N,
        max_epochs=3,
        gradient_clip_norm=0.5,
        save_every_n_updates=2,
        validate_every_n_updates=3,
        callbacks=[GradientAccumulationScheduler(SCHEDULING), witness],
        run_dir=folder,
    )
    states: list[Any] = []
    keeps = Callback()
    keeps.on_fit_end = lambda trainer: states.append(trainer.strategy.state_dict(trainer.optimizer))  # type: ignore[method-assign]
    trainer.callbacks.append(keeps)
    trainer.fit(task or Full())
    return trainer.interrupted_by, trainer.update, states, witness.sum


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if name != "samples_per_second"} for r in records]


def check_samples(folder: Path, P: int) -> None:
    """Of each update the last attempt counts; in each epoch every sample is seen once."""
    counts: dict[int, Counter[int]] = {}
    for rank in range(P):
        lines = [json.loads(line) for line in (folder.parent / f"seen-{rank}").read_text().splitlines()]
        for epoch, seen in {update: (epoch, seen) for update, epoch, seen in lines}.values():
            counts.setdefault(epoch, Counter()).update(seen)
    assert counts == {epoch: Counter(range(SAMPLES)) for epoch in range(3)}


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Counting(nn.Module):
    """Forward reads a buffer that it changes, as spectral norm does: processes differ by it within a window."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1).double()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * x.abs().mean())
        return self.linear(x) / self.scale
