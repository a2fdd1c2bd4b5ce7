"""Losses over a whole window: the gradient is that of one graph over the outputs of all its micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from strategies import DDPStrategy, FSDPStrategy
from tests.kit.processes import run
from tests.kit.windows import Balance, Clip, Dice, N, ShardedClip, fit, reference


def check(results: Any, expected: Any) -> None:
    for found, losses, _ in results:
        assert (found - expected[0]).abs().max() <= 1e-12 * expected[0].abs().max()
        assert losses == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("kind", [Clip, Balance, Dice])
@pytest.mark.parametrize("K", [1, 3, 4])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_ddp(kind: Any, K: int, P: int) -> None:
    task = kind(dropout=0.2)
    check(run(P, fit, task, DDPStrategy, K, 0.5), reference(task, P * N * K, clip=0.5))


@pytest.mark.parametrize(
    "options", [{}, {"wrap": ["Sequential"]}, {"wrap": ["Sequential"], "reshard_after_forward": False}]
)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("P", [1, 2, 3])
def test_fsdp(P: int, K: int, options: Any) -> None:
    task = ShardedClip(dropout=0.2)
    check(run(P, fit, task, partial(FSDPStrategy, **options), K, 0.5), reference(task, P * N * K, clip=0.5))


@pytest.mark.parametrize("strategy", [DDPStrategy, partial(FSDPStrategy, wrap=["Sequential"])])
def test_buffers_move_once(strategy: Any) -> None:
    task, P, K = ShardedClip(23, dropout=0.2, norm=True), 2, 3  # BatchNorm takes no single sample
    results, expected = run(P, fit, task, strategy, K), reference(task, P * N * K, P=P)
    check(results, expected)
    for found, wanted in zip(results[0][2], expected[2], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("strategy", ["single", "dp"])
@pytest.mark.parametrize("K", [1, 3])
def test_one_process(strategy: str, K: int) -> None:
    task = Clip()
    check([fit(task, strategy, K)], reference(task, N * K))


class InOrder(Clip):
    """A loss that depends on the order of the rows."""

    def window_loss(self, outputs: Any) -> torch.Tensor:
        products = (outputs["image"] * outputs["text"]).sum(1)
        return (products * torch.arange(len(products))).mean() * outputs["scale"].sum()


@pytest.mark.parametrize("spread", [False, True])
def test_rows_are_in_the_order_of_samples(spread: bool) -> None:
    results = run(2, partial(fit, spread_windows=spread), InOrder(), DDPStrategy, 3)
    check(results, reference(InOrder(), 2 * N * 3))
