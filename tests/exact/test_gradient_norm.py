"""The norm of many small gradients: taken together on a CPU, and the same number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from strategies import SingleDeviceStrategy
from strategies.gradient_norm import FEW, SMALL


class SeenNorms(TorchDispatchMode):
    """Keeps how many tensors have a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._foreach_norm:
            self.tensors += len(args[0])
        return func(*args, **(kwargs or {}))


def strategy_with(gradients: list[torch.Tensor]) -> SingleDeviceStrategy:
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients])
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient.clone()
    strategy = SingleDeviceStrategy("cpu")
    strategy.prepare(model)
    return strategy


def many(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (), (SMALL + 1,), (SMALL,), (4, 2, 2), (0,), (33, 40)] * 6
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_norm_is_that_of_all_elements(dtype: torch.dtype, max_norm: float | None) -> None:
    gradients = many(dtype)
    strategy = strategy_with(gradients)
    expected = math.sqrt(sum(float((gradient.abs() ** 2).sum()) for gradient in gradients))
    assert strategy.clip(max_norm, 0.25).item() == pytest.approx(0.25 * expected, rel=1e-14)
    after = math.sqrt(sum(float((gradient.abs() ** 2).sum()) for gradient in strategy._gradients()))
    assert after == pytest.approx(min(0.25 * expected, max_norm or math.inf), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_gradient_that_is_not_finite_shows(bad: float) -> None:
    gradients = many(torch.float32)
    gradients[1][3] = bad
    assert not math.isfinite(strategy_with(gradients).clip(None).item())


def test_dtypes_that_differ_are_taken_together() -> None:
    gradients = many(torch.float64) + many(torch.float32)
    expected = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    assert strategy_with(gradients).clip(None).item() == pytest.approx(expected, rel=1e-6)


def test_small_gradients_share_a_norm_and_large_ones_keep_theirs() -> None:
    gradients = [torch.randn(SMALL) for _ in range(1000)] + [torch.randn(SMALL + 1) for _ in range(5)]
    for count, norms in ((1000, 1 + 0), (1005, 1 + 5), (FEW, FEW)):
        strategy = strategy_with(gradients[:count])
        with SeenNorms() as seen:
            strategy.clip(None)
        assert seen.tensors == norms
