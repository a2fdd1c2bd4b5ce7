"""Tasks with several terms, each with a weight of its own, and their reference: one big batch in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine import Loss, Task, TermTask
from tests.kit.reference import parameters
from tests.kit.windows import N, trained

TERMS = ("policy", "value", "penalty")
LR = 0.2


class Heads(nn.Module):
    """A trunk and a head for each of two terms; the second head is used by its term alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)[..., 0]


class Groups(Task):
    """Sequences of up to 7 tokens. `policy` counts valid tokens, `value` marked sequences, `penalty` samples or groups.

    Sequences in `masked` are not marked, and without tokens if `is_empty`. With `divides` all others are marked, and
    the sum of `value` in a micro-batch without marks is NaN, and so are its derivatives.
    """

    def __init__(
        self,
        samples: int,
        terms: Sequence[str] = TERMS,
        masked: Iterable[int] = (),
        divides: bool = False,
        is_empty: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, 7, 5, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 4, (samples, 7), generator=generator)
        self.valid = torch.arange(7) < torch.randint(1, 8, (samples, 1), generator=generator)
        self.marked = torch.rand(samples, generator=generator) < (1 if divides else 0.6)
        self.marked[rows := [i for i in masked if i < samples]] = False
        if is_empty:
            self.valid[rows] = False
        self.terms = tuple(terms)
        self.as_tensors, self.divides = True, divides

    def configure_model(self) -> nn.Module:
        return Heads().double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=LR)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(self.x, self.labels, self.valid, self.marked)

    def weights(self, batch: Any) -> dict[str, Any]:
        x, _, valid, marked = batch
        counts = {"policy": int(valid.sum()), "value": marked.sum(), "penalty": len(x) / 4}
        return {name: counts[name] for name in self.terms}

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, labels, valid, marked = batch
        scores, values = model(x)
        losses = nn.functional.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
        value = ((values.mean(1) - 1).square() * marked).sum()
        return {
            "policy": (losses * valid).sum(),
            "value": value / marked.sum() * marked.sum() if self.divides else value,
            "penalty": scores.square().sum() / 100 * (1 + values.abs().sum() / 10),
        }

    def loss(self, model: nn.Module, batch: Any) -> Any:
        sums = self.sums(model, batch)
        weights = self.weights(batch) if self.as_tensors else {n: float(w) for n, w in self.weights(batch).items()}
        return {name: Loss(sums[name], weights[name]) for name in self.terms}


class GroupsTwice(Groups, TermTask):
    """The same terms, as if only the forward knew their weights."""

    weights = Task.weights

    def loss(self, model: nn.Module, batch: Any) -> Any:
        sums = self.sums(model, batch)
        return {name: Loss(sums[name], weight) for name, weight in Groups.weights(self, batch).items()}


def reference(task: Groups, windows: Iterable[Sequence[Sequence[int]]], clip: float | None = None) -> Any:
    """Return the parameters after each window's update, the mean of each term and of all, by one graph a window.

    A window is a list of micro-batches: a sum over rows need not be the sum of the sums of its parts.
    """
    torch.manual_seed(0)
    model, records = task.configure_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for window in windows:
        sums: Any = dict.fromkeys(task.terms, 0.0)
        weights = dict.fromkeys(task.terms, 0.0)
        for rows in window:
            batch = [part[list(rows)] for part in (task.x, task.labels, task.valid, task.marked)]
            found, counted = task.sums(model, batch), Groups.weights(task, batch)
            for name in task.terms:
                sums[name] = sums[name] + found[name]
                weights[name] += float(counted[name])
        means = {name: sums[name] / weights[name] for name in task.terms if weights[name]}
        optimizer.zero_grad()
        if means:
            loss = sum(means.values())
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        records.append(
            {
                name: float(mean.detach()) if means else 0.0
                for name, mean in (means | {"loss": sum(means.values())}).items()
            }
        )
    return parameters(model), records


def cut(samples: int, window: int) -> list[list[range]]:
    """The windows of an epoch that is not shuffled, each as micro-batches of N."""
    stops = [(start, min(start + window, samples)) for start in range(0, samples, window)]
    return [[range(i, min(i + N, stop)) for i in range(start, stop, N)] for start, stop in stops]


def fit(task: Groups, strategy: Any, K: int, clip: float | None = None, **settings: Any) -> Any:
    found, _, records = trained(task, strategy, K, clip, **settings)
    return found, records


def check(results: Any, expected: Any) -> None:
    """Compare what processes returned by `fit` with the reference."""
    for found, records in results:
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-12)
        for record, wanted in zip(records, expected[1], strict=True):
            for name in {*TERMS} | {"loss"}:
                assert (name in record and record[name] == record[name]) == (name in wanted and len(wanted) > 1)
                if name in wanted and len(wanted) > 1:
                    assert abs(record[name] - wanted[name]) <= 1e-12 * abs(wanted[name]), name
