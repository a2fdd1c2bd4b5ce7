"""The model and data of the checks, and the reference: one big batch, in plain torch in float64."""

from collections.abc import Iterator, Mapping, Sequence
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
        self,
        samples: int,
        tokens: bool = False,
        adam: bool = False,
        pieces: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
        self.y = torch.sin(3 * self.x.sum(1, keepdim=True))
        self.weight = (torch.arange(samples) * 3 % 4 if tokens else torch.ones(samples)).double()
        self.tokens = tokens
        self.adam = adam
        self.pieces = pieces
        self.rank = 0  # this data-parallel process: which of the pieces it reads

    def configure_model(self) -> nn.Module:
        return network()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters()) if self.adam else torch.optim.SGD(model.parameters(), lr=LR)

    def train_data(self) -> Any:
        return TensorDataset(self.x, self.y, self.weight) if self.pieces is None else _Stream(self)

    def loss(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        x, y, weight = batch
        errors = (model(x) - y).square().squeeze(1)
        return Loss((weight * errors).sum(), weight.sum()) if self.tokens else errors.mean()

    def gradient(self, model: nn.Module, rows: Sequence[int]) -> list[Tensor]:
        """Return the gradient of ONE batch of these samples."""
        x, y, weight = (values[list(rows)] for values in (self.x, self.y, self.weight))
        loss = (weight * (model(x) - y).square().squeeze(1)).sum() / weight.sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def big_batches(self, windows: Sequence[Sequence[int]], max_norm: float | None = None) -> State:
        """Return the parameters after one SGD update for each window that has a weight, each made of one big batch."""
        model = network()
        for rows in windows:
            if not self.weight[list(rows)].sum():
                continue
            gradients = self.gradient(model, rows)
            norm = float(torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(()))))
            clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.sub_(LR * clip * gradient)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


class WindowRegression(Regression, WindowTask):
    """Squared errors, and the variance of the outputs over the window, which no micro-batch knows."""

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        x, y, _ = batch
        guess = model(x)
        return {"guess": Rows(guess), "error": Added((guess - y).square().sum())}

    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        guess = outputs["guess"]
        return outputs["error"] / len(guess) + (guess - guess.mean()).square().mean()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return WindowTask.loss(self, model, batch)

    def gradient(self, model: nn.Module, rows: Sequence[int]) -> list[Tensor]:
        batch = self.x[list(rows)], self.y[list(rows)], None
        return list(torch.autograd.grad(self.loss(model, batch), list(model.parameters())))


class _Stream:
    """The ready micro-batches of one process."""

    def __init__(self, task: Regression) -> None:
        self._task = task

    def __iter__(self) -> Iterator[Any]:
        task = self._task
        for rows in (task.pieces or [])[task.rank]:
            yield task.x[list(rows)], task.y[list(rows)], task.weight[list(rows)]


def in_order(samples: int, effective_batch: int) -> list[range]:
    """Return the windows of an epoch that is not shuffled."""
    return [range(start, min(start + effective_batch, samples)) for start in range(0, samples, effective_batch)]


def deal(lengths: Sequence[int], sizes: Sequence[int]) -> list[list[range]]:
    """Return, for each process, `length` micro-batches of samples in ascending order, whose sizes cycle."""
    pieces: list[list[range]] = []
    sample = number = 0
    for length in lengths:
        pieces.append([])
        for _ in range(length):
            size = sizes[number % len(sizes)]
            pieces[-1].append(range(sample, sample + size))
            sample, number = sample + size, number + 1
    return pieces


def windows_of(pieces: Sequence[Sequence[range]], K: int) -> list[list[int]]:
    """Return the samples of each update: micro-batches uK to uK+K-1 of every process."""
    longest = max(len(own) for own in pieces)
    return [
        [row for own in pieces for piece in own[start : start + K] for row in piece] for start in range(0, longest, K)
    ]


def difference(found: State, expected: State) -> float:
    """Return the largest difference of values, relative to the largest expected; infinite for NaN and other shapes."""
    mine, theirs = (torch.cat([value.double().flatten() for value in state.values()]) for state in (found, expected))
    if mine.shape != theirs.shape or not bool(mine.isfinite().all()):
        return float("inf")
    return float((mine - theirs).abs().max() / theirs.abs().max())
