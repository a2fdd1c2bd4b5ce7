"""The model and data of the checks, and the reference: one big batch, in plain torch in float64."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, cycle, islice, pairwise, starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine.loss import Loss
from engine.task import Task
from engine.window_task import Added, Output, Rows, WindowTask

LR = 0.1
State = dict[str, Tensor]


def network() -> nn.Sequential:
    """Return a small model in float64, the same each time."""
    layers = nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return model


class Regression(Task):
    """Squared errors: their mean over samples, or over `tokens`, of which samples have 0 to 3.

    `pieces` makes it a stream: for each data-parallel process, the samples of each of its micro-batches.
    """

    def __init__(
        self, samples: int, tokens: bool = False, adam: bool = False, pieces: Sequence[Sequence[Sequence[int]]] = ()
    ) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
        self.y = torch.sin(3 * self.x.sum(1, keepdim=True))
        self.weight = (torch.arange(samples) * 3 % 4 if tokens else torch.ones(samples)).double()
        self.tokens, self.adam, self.pieces = tokens, adam, pieces
        self.rank = 0  # this data-parallel process: which of the pieces it reads

    def configure_model(self) -> nn.Module:
        return network()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters()) if self.adam else torch.optim.SGD(model.parameters(), lr=LR)

    def train_data(self) -> Any:
        return self if self.pieces else TensorDataset(self.x, self.y, self.weight)

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, self.pieces[self.rank])

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return these samples as a batch."""
        return self.x[list(rows)], self.y[list(rows)], self.weight[list(rows)]

    def total(self, model: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return the sum of losses."""
        x, y, weight = batch
        return torch.as_tensor((weight * (model(x) - y).square().squeeze(1)).sum())

    def loss(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        total, weight = self.total(model, batch), batch[2].sum()
        return Loss(total, weight) if self.tokens else total / weight

    def mean(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Return the loss of ONE batch of these samples."""
        batch = self.batch(rows)
        return self.total(model, batch) / batch[2].sum()

    def gradient(self, model: nn.Module, rows: Sequence[int]) -> list[Tensor]:
        """Return the gradient of ONE batch of these samples."""
        return list(torch.autograd.grad(self.mean(model, rows), list(model.parameters())))

    def set_gradient(
        self, model: nn.Module, rows: Sequence[int], factor: float = 1.0, max_norm: float | None = None
    ) -> float:
        """Give `model` the gradient of ONE batch, times `factor` and clipped; return its norm between the two."""
        for parameter, gradient in zip(model.parameters(), self.gradient(model, rows), strict=True):
            parameter.grad = gradient * factor
        return float(nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm))

    def big_batches(self, windows: Sequence[Sequence[int]], max_norm: float | None = None) -> State:
        """Return the parameters after one SGD update for each window that has a weight, each made of one big batch."""
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for rows in windows:
            if self.weight[list(rows)].sum():
                self.set_gradient(model, rows, max_norm=max_norm)
                optimizer.step()
        return dict(model.state_dict())


class WindowRegression(WindowTask, Regression):
    """Squared errors, and the variance of the outputs over the window, which no micro-batch knows."""

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        x, y, _ = batch
        guess = model(x)
        return {"guess": Rows(guess), "error": Added((guess - y).square().sum())}

    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        guess = outputs["guess"]
        return outputs["error"] / len(guess) + (guess - guess.mean()).square().mean()

    def mean(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        return self.loss(model, self.batch(rows))


def in_order(samples: int, effective_batch: int) -> list[range]:
    """Return the windows of an epoch that is not shuffled."""
    return [range(start, min(start + effective_batch, samples)) for start in range(0, samples, effective_batch)]


def deal(lengths: Sequence[int], sizes: Sequence[int]) -> list[list[range]]:
    """Return, for each process, `length` micro-batches of samples in ascending order, whose sizes cycle."""
    ends = accumulate(islice(cycle(sizes), sum(lengths)), initial=0)
    pieces = starmap(range, pairwise(ends))
    return [list(islice(pieces, length)) for length in lengths]


def windows_of(pieces: Sequence[Sequence[Sequence[int]]], K: int) -> list[list[int]]:
    """Return the samples of each update: micro-batches uK to uK+K-1 of every process."""
    starts = range(0, max(len(own) for own in pieces), K)
    return [[row for own in pieces for piece in own[start : start + K] for row in piece] for start in starts]


def difference(found: State, expected: State) -> float:
    """Return the largest difference of values, relative to the largest expected; infinite for NaN and other shapes."""
    mine, theirs = (torch.cat([value.double().flatten() for value in state.values()]) for state in (found, expected))
    if mine.shape != theirs.shape or not bool(mine.isfinite().all()):
        return float("inf")
    return float((mine - theirs).abs().max() / theirs.abs().max())
