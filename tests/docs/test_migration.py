"""The migration pages: their programs run as they stand and print the numbers that the pages name."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.pages import blocks
from tests.kit.processes import on_processes, run
from tests.kit.reference import in_order

SAMPLES, N, K, LR = 1001, 8, 4, 0.1
X = torch.linspace(-1, 1, SAMPLES)[:, None].double()
Y = 3 * X + 1


def trained(gradient: Callable[[Any, range], Any], P: int = 1) -> Tensor:
    """The reference in float64: by which rule the loss of a window is made of those of its micro-batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    line = torch.tensor([model.weight.item(), model.bias.item()], dtype=torch.float64, requires_grad=True)
    for window in in_order(SAMPLES, N * K * P):

        def mean(rows: list[int], line: Tensor = line) -> Tensor:
            return (line[0] * X[rows] + line[1] - Y[rows]).square().mean()

        (slope,) = torch.autograd.grad(gradient(mean, window), line)
        line = (line - LR * slope).detach().requires_grad_()
    return line.detach()


def as_one_batch(mean: Any, window: range) -> Any:
    return mean(list(window))


def each_divided_by_K(mean: Any, window: range) -> Any:
    return sum(mean(list(window)[i : i + N]) for i in range(0, len(window), N)) / K


def full_windows_only(mean: Any, window: range) -> Any:
    return as_one_batch(mean, window) * (len(window) == N * K)


def program(page: str, number: int) -> tuple[Tensor, int]:
    torch.set_grad_enabled(True)
    found: dict[str, Any] = {"__name__": "program"}
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        exec(compile(blocks(page)[number], page, "exec"), found)
    line = torch.nn.utils.parameters_to_vector(found["model"].parameters())
    return line.detach(), int(found["updates"])


BEFORE = [
    ("docs/from-a-plain-loop.md", "torch", full_windows_only, 31),
    ("docs/from-lightning.md", "lightning.pytorch", each_divided_by_K, 32),
    ("docs/from-accelerate.md", "accelerate", each_divided_by_K, 32),
]
AFTER = [
    ("docs/from-a-plain-loop.md", 1),
    ("docs/from-a-plain-loop.md", 2),
    ("docs/from-lightning.md", 1),
]


@pytest.mark.parametrize(("page", "package", "rule", "updates"), BEFORE)
def test_before(page: str, package: str, rule: Any, updates: int, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)

    @on_processes(1, group=False)
    def results() -> tuple[Tensor, int]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        return program(page, 0)

    ((line, made),) = results
    torch.testing.assert_close(line.double(), trained(rule), rtol=0, atol=2e-6)
    assert made == updates


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize(("page", "number"), AFTER)
def test_after(page: str, number: int, P: int) -> None:
    for line, made in run(P, program, page, number):
        torch.testing.assert_close(line.double(), trained(as_one_batch, P), rtol=0, atol=2e-6)
        assert made == -(-SAMPLES // (N * K * P))


def test_the_rules_come_out_apart() -> None:
    lines = [trained(rule) for rule in (as_one_batch, each_divided_by_K, full_windows_only)]
    assert min((a - b).abs().max() for a, b in [lines[:2], lines[1:], lines[::2]]) > 1e-3


def test_the_model_of_transformers_trains_alike_on_one_and_two_processes() -> None:
    pytest.importorskip("transformers")
    page = "docs/transformers.md"
    (one, updates), *others = [*run(1, program, page, 0), *run(2, program, page, 0)]
    assert updates == 3 * -(-50 // 16)
    for other, made in others:
        assert made == updates
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3)  # AdamW in float32 enlarges rounding
