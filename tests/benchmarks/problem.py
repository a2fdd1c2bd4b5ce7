"""What all contenders train: a model so small that everything around it shows, on ready micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

WINDOWS = (1, 8)
"""The K that are measured. Each divides the three numbers below, so that windows begin and end with them."""
WARM_UP, MEASURED, REST = 24, 240, 16
MICRO_BATCHES = WARM_UP + MEASURED + REST
N, FEATURES = 8, 32

Data = Iterable[tuple[Tensor, Tensor]]
Contender = Callable[[Data, int], nn.Module]
"""Trains `configured()`'s model on micro-batches, with windows of K, and returns it."""

loss_fn = nn.functional.mse_loss


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, FEATURES)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def configured() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    return model, make_optimizer(model)


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = MICRO_BATCHES * N, FEATURES
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def nothing() -> None:
    pass


class Feed:
    """Ready micro-batches; it calls `start` before the measured ones are read, and `stop` after.

    It has no `__getitem__`: with that it would be a dataset of samples. Chaining lists adds no Python call.
    """

    def __init__(self, start: Callable[[], None] = nothing, stop: Callable[[], None] = nothing) -> None:
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return MICRO_BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = list(zip(*(tensor.split(N) for tensor in samples()), strict=True))
        end = WARM_UP + MEASURED
        return chain(data[:WARM_UP], self._at(self._start), data[WARM_UP:end], self._at(self._stop), data[end:])

    @staticmethod
    def _at(event: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
        event()
        yield from ()


@contextmanager
def at_updates(events: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Call each event after so many updates (from 1), whoever makes them."""
    updates = count(1)

    def see(*_: object) -> None:
        if event := events.get(next(updates)):
            event()

    handle = register_optimizer_step_post_hook(see)
    try:
        yield
    finally:
        handle.remove()
