"""Two models in a loop of your own: one strategy each, and the model that does not learn frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from engine import Accumulator
from strategies import DDPStrategy, FSDPStrategy, PipelineStrategy, SingleDeviceStrategy, Strategy
from tests.kit.processes import ChildError, on_processes, run

ROWS = torch.randn(96, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
NOISE = torch.randn(96, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DATA = torch.utils.data.TensorDataset(ROWS, NOISE)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    sizes = ((4, 8, 2), (2, 8, 1))
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).double() for a, b, c in sizes]


def losses(generator: nn.Module, critic: nn.Module, rows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What the critic learns by, and what the generator learns by."""
    real, fake = torch.ones(len(rows), 1).double(), torch.zeros(len(rows), 1).double()
    learned = cross_entropy(critic(rows), real) + cross_entropy(critic(generator(noise).detach()), fake)
    return learned, cross_entropy(critic(generator(noise)), real)


def by_hand() -> list[nn.Module]:
    models = networks()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for start in (*range(0, 96, 16), *range(0, 96, 16)):
        for turn in (1, 0):  # the critic, then the generator
            optimizers[turn].zero_grad()
            losses(*models, ROWS[start : start + 16], NOISE[start : start + 16])[1 - turn].backward()
            optimizers[turn].step()
    return models


def learn(strategies: list[Strategy], freezes: bool) -> list[nn.Module]:
    raw, P = networks(), strategies[0].data_parallel_size
    models = [strategy.prepare(model) for strategy, model in zip(strategies, raw, strict=True)]
    accumulators = [
        Accumulator(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), DATA, 4, 4 // P, shuffle=False)
        for strategy, model in zip(strategies, models, strict=True)
    ]
    for epoch in range(2):
        for windows in zip(*(accumulator.windows(epoch) for accumulator in accumulators), strict=True):
            for turn in (1, 0):
                models[1].requires_grad_(turn == 1 or not freezes)
                for rows, noise in windows[turn]:
                    windows[turn].backward(losses(*models, rows, noise)[1 - turn])
                windows[turn].update()
            models[1].requires_grad_(True)
    return raw


def in_turn(name: str, freezes: bool, one: bool) -> Any:
    kind = {"single": SingleDeviceStrategy, "ddp": DDPStrategy}[name]
    strategies = [kind(), kind()]
    if one:
        strategies[1] = strategies[0]
    for strategy in strategies[: 2 - one]:
        strategy.setup()
    try:
        return [parameter.detach() for model in learn(strategies, freezes) for parameter in model.parameters()]
    except ValueError as error:
        return str(error)
    finally:
        for strategy in strategies[: 2 - one]:
            strategy.teardown()


@pytest.mark.parametrize(("name", "P"), [("single", 1), ("ddp", 2)])
def test_a_strategy_each_and_the_other_frozen_is_exact(name: str, P: int) -> None:
    expected = [parameter for model in by_hand() for parameter in model.parameters()]
    for found in run(P, in_turn, name, True, False, group=P > 1):
        torch.testing.assert_close(found, [p.detach() for p in expected], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "P"), [("single", 1), ("ddp", 2)])
def test_a_gradient_from_the_other_model_s_loss_is_refused(name: str, P: int) -> None:
    for found in run(P, in_turn, name, False, False, group=P > 1):
        assert "0.weight' has a gradient before the window's first backward: expected none" in found


@pytest.mark.parametrize(("name", "P"), [("single", 1), ("ddp", 2)])
def test_one_strategy_for_two_models_is_refused(name: str, P: int) -> None:
    for found in run(P, in_turn, name, True, True, group=P > 1):
        assert found.startswith(f"strategy '{name}' has prepared a model already: expected one model for each strategy")


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, PipelineStrategy])
def test_every_strategy_takes_one_model_at_a_time(kind: type[Strategy]) -> None:
    @on_processes(2)
    def results() -> list[str]:
        strategy, texts = kind(), []
        for _ in range(2):  # teardown lets go of the model
            strategy.setup()
            for _ in range(2):
                try:
                    strategy.prepare(networks()[0])
                except ValueError as error:
                    texts.append(str(error))
            dist.barrier()  # or one would leave while the other still connects to it
            strategy.teardown()
        return texts

    for texts in results:
        assert [text.split(":")[0] for text in texts] == [f"strategy '{kind.name}' has prepared a model already"] * 2


@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
def test_a_gradient_that_stays_is_an_error_on_all_where_one_has_no_micro_batch(on: tuple[int, ...]) -> None:
    def train() -> None:
        strategy = DDPStrategy(timeout_seconds=20)
        strategy.setup()
        inner = nn.Linear(1, 1)
        model = strategy.prepare(inner)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        accumulator = Accumulator(strategy, model, optimizer, torch.zeros(3, 1), 1)
        for window in accumulator.windows(0):
            if accumulator.update == 1 and strategy.rank in on:  # the window of the third sample
                inner.weight.grad = torch.ones(1, 1)
            for x in window:
                window.backward(model(x).mean())
            window.update()

    with pytest.raises(ChildError, match="has a gradient before the window's first backward") as raised:
        run(2, train)
    assert ["has a gradient before" in text for text in raised.value.errors.values()] == [True, True]
