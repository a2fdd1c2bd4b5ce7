"""Each precision on every layout: the same parameters, losses and norms, in float32, and skips that are agreed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Loss, Trainer
from tests.kit.processes import run
from tests.kit.reference import Regression, Watch, in_order, mlp, parameters

LAYOUTS = [(1, 4), (2, 2), (4, 1)]
SAMPLES, N, EPOCHS = 44, 4, 3  # the last window has three micro-batches: one process has none at P=4
SMALL, LARGE = 2.0**-6, 2.0**3  # losses that fp16's first scale leaves finite, and that it does not
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Single(Regression):
    """Regression in float32; its loss is `factor` times as large, weighted by a number that each micro-batch brings."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(SAMPLES, lr=0.05 / factor, model=lambda: mlp().float())
        self.x, self.y, self.factor = self.x.float(), self.y.float(), factor
        self.weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(1)) + 0.5

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y, index = batch
        weights = self.weights[index]
        errors = nn.functional.mse_loss(model(x).float(), y, reduction="none")[:, 0]
        return Loss(self.factor * (errors * weights).sum(), weights.sum())


def fit(precision: str, K: int, factor: float) -> Any:
    watch = Watch()
    trainer = Trainer(
        "ddp",
        micro_batch_size=N,
        accumulate_grad_batches=K,
        max_epochs=EPOCHS,
        shuffle=False,
        precision=precision,
        gradient_clip_norm=0.5 * factor,
        callbacks=watch,
    )
    trainer.fit(Single(factor))
    return parameters(trainer.model), watch.records


def reference(precision: str, factor: float) -> tuple[Tensor, list[float]]:
    """The same micro-batches through the same autocast, gradients summed in float64: no engine, no loss scale."""
    torch.manual_seed(0)
    task = Single(factor)
    model, losses = task.model(), []
    for window in in_order(SAMPLES, 4 * N) * EPOCHS:
        weight = task.weights[list(window)].double().sum()
        totals = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
        total = 0.0
        for start in range(window.start, window.stop, N):
            rows = torch.arange(start, min(start + N, window.stop))
            with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
                loss = task.loss(model, (task.x[rows], task.y[rows], rows)).sum
            total += loss.item()
            for sum_, g in zip(totals, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                sum_ += g.double() / weight
        norm = torch.sqrt(sum((g**2).sum() for g in totals))
        losses.append(total / weight.item())
        with torch.no_grad():
            for p, g in zip(model.parameters(), totals, strict=True):
                p -= (task.lr * g * min(1.0, 0.5 * factor / (norm.item() + 1e-6))).float()
    return parameters(model), losses


@pytest.mark.parametrize("precision", DTYPES)
def test_a_precision_does_not_know_P(precision: str) -> None:
    expected, losses = reference(precision, SMALL)
    # fp16's backward rounds the scaled gradient: scaling by a power of two is exact, underflow apart
    tolerance = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 1e-4}[precision]
    norms = []
    for P, K in LAYOUTS:
        for found, records in run(P, fit, precision, K, SMALL):
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            torch.testing.assert_close([r["loss"] for r in records], losses, rtol=10 * tolerance, atol=0)
            assert not records[-1]["skipped"]
            norms.append(torch.tensor([r["grad_norm"] for r in records]))
    for norm in norms:
        torch.testing.assert_close(norm, norms[0], rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize(("P", "K"), LAYOUTS)
def test_an_fp16_overflow_is_skipped_on_all_processes(P: int, K: int) -> None:
    results = run(P, fit, "fp16", K, LARGE)
    for found, records in results:
        assert torch.equal(found, results[0][0])
        assert [r["skipped"] for r in records] == [r["skipped"] for r in results[0][1]]
        assert 0 < records[-1]["skipped"] < len(records)  # the scale came down, and training went on
