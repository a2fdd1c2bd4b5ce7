"""What an update takes on each process: memory at its peak, and bytes given to collectives."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Callback, Task, Trainer
from tests.benchmarks.cases import Case, tower
from tests.kit.processes import run

LAYERS, WIDTH = 16, 1024
GRADIENTS = 4 * LAYERS * WIDTH**2  # bytes
MIB = 2**20
UPDATES = 2  # the second has the optimizer's state, and whatever was found in the first
MESSAGE = 1024  # bytes: a smaller tensor is no gradient, parameter or activation

KINDS = {
    "allreduce_": "gradients",
    "_reduce_scatter_base_": "gradients",
    "_allgather_base_": "parameters",
    "broadcast_": "parameters",
    "send": "activations",
    "allgather_": "messages",
}


class Footprint(NamedTuple):
    """Of the process that has most, each: MiB of memory, MiB of optimizer state, bytes by kind."""

    peak: float
    state: float
    given: Counter[str]


class Samples(torch.utils.data.Dataset[Tensor]):
    """Made when they are asked for, so that a longer window is no larger a dataset."""

    def __init__(self, length: int, width: int) -> None:
        self._length, self._width = length, width

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self._width,), index / self._length)


class Autoencoder(Task):
    def __init__(self, samples: int, width: int) -> None:
        self._samples, self._width = samples, width

    def configure_model(self) -> nn.Module:
        return tower(LAYERS, self._width, torch.float32)

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train_data(self) -> Samples:
        return Samples(self._samples, self._width)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(batch), batch)


class Traffic(TorchDispatchMode, Callback):
    """Adds up what each update gives to collectives: tensors to be reduced or sent, and those that parameters fill."""

    def __init__(self) -> None:
        super().__init__()
        self._given: Counter[str] = Counter()

    def on_update_end(self, trainer: Trainer) -> None:
        self.last, self._given = self._given, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if kind := KINDS.get(name):
            given = args[1] if name in ("_reduce_scatter_base_", "allgather_") else args[0]  # outputs come first
            size = sum(tensor.nbytes for tensor in (given if isinstance(given, list) else [given]))
            self._given[kind if size > MESSAGE else "messages"] += size
        return func(*args, **(kwargs or {}))


def train(case: Case, K: int, N: int, width: int) -> Footprint:
    """Train, and return what this process used."""
    strategy, traffic = case.make(K), Traffic()
    samples = UPDATES * strategy.effective_batch(N, K)
    trainer = Trainer(strategy, N, accumulate_grad_batches=K, max_epochs=1, callbacks=traffic)
    with traffic:
        trainer.fit(Autoencoder(samples, width))
    assert trainer.update == UPDATES, f"{trainer.update} updates"
    state = sum(
        (value.to_local() if hasattr(value, "to_local") else value).nbytes
        for values in trainer.optimizer.state.values()
        for value in values.values()
    )
    return Footprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, state / MIB, traffic.last)


def footprint(case: Case, K: int, N: int, width: int = WIDTH) -> Footprint:
    """Return what the process with most of it uses; memory is above that of the same run of a tiny model."""
    tiny, real = (
        [Footprint(*each) for each in run(case.processes, train, case, K, N, w, seconds=500, timeout=400)]
        for w in (8, width)
    )
    largest = Counter({kind: max(each.given[kind] for each in real) for kind in set(KINDS.values())})
    return Footprint(
        max(a.peak - b.peak for a, b in zip(real, tiny, strict=True)), max(each.state for each in real), largest
    )


def least(case: Case, K: int, N: int, width: int = WIDTH) -> float:
    """Return the fewest bytes that an update of this model can give."""
    return case.least(4 * LAYERS * width**2, 4 * N * width, K)
