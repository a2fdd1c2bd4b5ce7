"""Losses that bring their weight: an update is torch's own mean over the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from engine import Task, Trainer, losses
from tests.kit.processes import on_processes

CLASSES = 4
LENGTHS = [5, 1, 3, 2, 5, 4, 1, 1, 2, 3, 5]
CLASS_WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.float64)


class Texts(Dataset[Any]):
    """Samples of unequal numbers of targets, of which the 7th has none."""

    def __init__(self, kind: str) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(len(LENGTHS), 5, 3, dtype=torch.float64, generator=draw)
        self.y = torch.randint(0, CLASSES, (len(LENGTHS), 5), generator=draw)
        for index, length in enumerate(LENGTHS):
            self.y[index, length if index != 7 else 0 :] = -100
        if kind == "soft":
            self.y = torch.rand(len(LENGTHS), CLASSES, 5, dtype=torch.float64, generator=draw).softmax(1)
        if kind in ("mse_loss", "binary"):
            self.y = torch.rand(len(LENGTHS), CLASSES, 5, dtype=torch.float64, generator=draw)

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ignored": ("cross_entropy", {}),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.2}),
    "class weights": ("cross_entropy", {"weight": CLASS_WEIGHTS}),
    "class weights, smoothed": ("cross_entropy", {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2}),
    "another ignored": ("cross_entropy", {"weight": CLASS_WEIGHTS, "ignore_index": 2}),
    "soft": ("cross_entropy", {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2}),
    "nll": ("nll_loss", {"weight": CLASS_WEIGHTS}),
    "binary": ("binary_cross_entropy_with_logits", {"pos_weight": torch.tensor(3.0, dtype=torch.float64)}),
    "mse_loss": ("mse_loss", {}),
}


def scores(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    found: Tensor = model(x).transpose(1, 2)
    return found.log_softmax(1) if kind == "nll" else found


def targets(y: Tensor, options: dict[str, Any]) -> Tensor:
    return y.clamp(min=0) if "ignore_index" in options else y


class Scores(Task):
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.function, self.options = CASES[kind]

    def configure_model(self) -> nn.Module:
        return nn.Linear(3, CLASSES).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def train_data(self) -> Any:
        return Texts(self.kind)

    def validation_data(self) -> Any:
        return Texts(self.kind)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        y = targets(batch[1], self.options)
        return getattr(losses, self.function)(scores(model, batch[0], self.kind), y, **self.options)


def by_torch(kind: str) -> Any:
    """Torch's own mean, of one batch an update."""
    task, data = Scores(kind), Texts(kind)
    torch.manual_seed(0)
    model = task.configure_model()

    def mean(rows: slice) -> Tensor:
        y = targets(data.y[rows], task.options)
        found: Tensor = getattr(functional, task.function)(scores(model, data.x[rows], kind), y, **task.options)
        return found

    for rows in (slice(0, 8), slice(8, 11)) * 2:
        model.zero_grad()
        mean(rows).backward()
        task.configure_optimizer(model).step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), mean(slice(0, 11)).item()


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("dp", 1), ("ddp", 3)])
@pytest.mark.parametrize("kind", CASES)
def test_an_update_is_torchs_mean_over_the_whole_batch(kind: str, strategy: str, P: int) -> None:
    parameters, metric = by_torch(kind)

    @on_processes(P)
    def results() -> Any:
        trainer = Trainer(strategy, micro_batch_size=1, effective_batch_size=8, max_epochs=2, shuffle=False)
        trainer.fit(Scores(kind))
        model = trainer.model
        return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer.metrics["loss"]

    for found, found_metric in results:
        torch.testing.assert_close(found, parameters, rtol=0, atol=1e-12)
        assert found_metric == pytest.approx(metric, rel=1e-12)


def test_a_sum_of_half_precision_scores_is_float32() -> None:
    found = losses.cross_entropy(torch.randn(3, 4, dtype=torch.bfloat16), torch.tensor([1, -100, 2]))
    assert found.sum.dtype == torch.float32
    assert found.weight == 2


def test_class_numbers_in_uint8_and_half_precision_weights_count_as_in_torch() -> None:
    x, y, weight = torch.randn(4, 200), torch.tensor([156, 156, 3, 199]), torch.rand(200).half()
    for given in (y, y.byte()):  # 156 is -100 in uint8
        for found in (losses.cross_entropy(x.half(), given, weight), losses.nll_loss(x.half(), given, weight)):
            assert found.weight == pytest.approx(weight.float()[y].sum().item())
        assert losses.cross_entropy(x, given).weight == 4
