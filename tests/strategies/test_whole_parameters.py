"""Optimizers that need whole matrices get them, whatever the shards, and each process keeps the state of its share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon

from engine import Trainer, parameter_groups
from strategies import DDPStrategy, DPStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from tests.kit.optimizers import KeepModel, is_matrix, tower
from tests.kit.processes import run
from tests.kit.reference import Regression, in_order

SAMPLES, WINDOW, EPOCHS, CLIP = 72, 24, 2, 0.2


class Polar(torch.optim.Optimizer):
    """Steps along the orthogonal factor of the momentum, in the dtype of the parameters."""

    needs_whole_parameters = True

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                p.mul_(1 - 0.01 * group["lr"]).sub_(u @ v, alpha=group["lr"])


class Whole(Regression):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__(SAMPLES, model=tower)
        self.kind, self.options = kind, options
        self.entered: list[dict[str, Tensor]] = []

    def configure_optimizer(self, model: nn.Module) -> Any:
        matrices, rest = parameter_groups(model, matrices=is_matrix, rest="*")
        names = {p: name for name, p in model.named_parameters()}
        first = self.kind([matrices], lr=0.02, **self.options)
        first.register_step_pre_hook(lambda optimizer, *_: self.enter(names, optimizer))
        return [first, AdamW([rest], lr=0.01)]

    def enter(self, names: dict[Any, str], optimizer: Any) -> None:
        """Keep the gradients that enter a step, by shape: each matrix here has another."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.entered.append({str(tuple(gradient.shape)): gradient.clone() for gradient in gradients})


def fit(strategy: Strategy, task: Whole) -> Any:
    N = WINDOW // (2 * strategy.data_parallel_size)
    trainer = Trainer(strategy, N, 2, gradient_clip_norm=CLIP, shuffle=False, max_epochs=EPOCHS, callbacks=KeepModel())
    trainer.fit(task)
    kept = sum(
        value.numel()
        for state in trainer.optimizer.state.values()
        for value in [state.get("momentum")]
        if value is not None
    )
    steps = [group.get("steps") for group in trainer.optimizer.param_groups]
    return (trainer.callbacks[0].vector if strategy.rank == 0 else None), task.entered, kept, steps


def by_hand(task: Whole) -> tuple[Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = task.model()
    optimizers = task.configure_optimizer(model)
    for rows in in_order(SAMPLES, WINDOW) * EPOCHS:
        model.zero_grad()
        nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)]).backward()
        clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
    return torch.cat([value.flatten() for value in model.state_dict().values()]), task.entered


STRATEGIES = [
    pytest.param(1, SingleDeviceStrategy("cpu"), id="single"),
    pytest.param(1, DPStrategy(2, "cpu"), id="dp"),
    pytest.param(2, DDPStrategy(), id="ddp"),
    pytest.param(3, DDPStrategy(shard_optimizer=True), id="zero1"),
    pytest.param(1, FSDPStrategy(), id="fsdp of one"),
    pytest.param(2, FSDPStrategy(), id="fsdp"),
    pytest.param(3, FSDPStrategy(reduce="micro_batch"), id="fsdp by micro-batch"),
    pytest.param(4, FSDPStrategy(shard_size=2), id="hybrid", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("P", "strategy"), STRATEGIES)
@pytest.mark.parametrize(("kind", "rounding"), [(Polar, 1e-12), (Muon, 2**-8 * 0.02)], ids=["polar", "muon"])
def test_a_matrix_is_stepped_whole_whatever_the_shards(P: int, strategy: Strategy, kind: Any, rounding: float) -> None:
    expected, entered = by_hand(Whole(kind))
    found = run(P, fit, strategy, Whole(kind), group=P > 1)
    torch.testing.assert_close(found[0][0], expected, rtol=0, atol=rounding * len(entered))
    for update, gradients in enumerate(entered):
        for shape, gradient in gradients.items():
            seen = [process[1][update][shape] for process in found if shape in process[1][update]]
            assert len(seen) == (P if strategy.name == "ddp" and not strategy.shard_optimizer else 1 + (P == 4))
            for whole in seen:
                atol = 1e-12 if update == 0 or kind is Polar else 1e-2
                torch.testing.assert_close(whole, gradient, rtol=0, atol=atol)
    if kind is Polar:
        assert all(process[3] == [len(entered), None] for process in found)


def test_each_process_keeps_the_state_of_its_share() -> None:
    sizes = [process[2] for process in run(3, fit, FSDPStrategy(), Whole(Polar))]
    assert sorted(sizes) == [3, 21, 35]


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Rprop], ids=lambda kind: kind.__name__)
def test_other_optimizers_of_torch_that_fail_on_shards(kind: Any) -> None:
    expected, _ = by_hand(Whole(kind))
    torch.testing.assert_close(run(2, fit, FSDPStrategy(), Whole(kind))[0][0], expected, rtol=0, atol=1e-12)
