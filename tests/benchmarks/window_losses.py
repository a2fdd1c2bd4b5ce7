"""How far accumulated contrastive losses are from one batch: gradients, relative error (P = 1, K = 4, N = 8, float64).

python -m tests.benchmarks.window_losses            # the gradients
python -m tests.benchmarks.window_losses --recipe   # what is learnt: two views of the digits, 20 epochs
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from engine import Task, Trainer
from engine.seeds import ODD, SEED_BITS, forward_seed
from launch.recipes.digits.views import DigitViews, retrieval
from tests.kit.windows import Clip

K, N = 4, 8
Gradients = list[Tensor]


def forward(task: Clip, model: nn.Module, index: int) -> Any:
    rows = slice(N * index, N * index + N)
    return {name: output.tensor for name, output in task.outputs(model, (task.x[rows], task.y[rows])).items()}


def joined(parts: list[Any]) -> Any:
    return {name: parts[0][name] if name == "scale" else torch.cat([p[name] for p in parts]) for name in parts[0]}


def seed(index: int) -> None:
    torch.manual_seed(forward_seed(0, 0) + index * N * ODD & SEED_BITS)


def one_graph(task: Clip, model: nn.Module) -> Gradients:
    """The gradient of one batch, with the draws of the engine's micro-batches."""
    parts = []
    for index in range(K):
        seed(index)
        parts.append(forward(task, model, index))
    task.window_loss(joined(parts)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def by_micro_batch(task: Clip, model: nn.Module) -> Gradients:
    """The mean of each micro-batch's own loss: every guide's accumulation."""
    for index in range(K):
        seed(index)
        (task.window_loss(forward(task, model, index)) / K).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def cached(task: Clip, model: nn.Module) -> Gradients:
    """Features of a first pass stand in for the other micro-batches; draws are not replayed, the scale is in each."""
    seed(0)
    with torch.no_grad():
        kept = [forward(task, model, index) for index in range(K)]
    for index in range(K):
        now = forward(task, model, index)
        parts = [now if other == index else {**part, "scale": now["scale"]} for other, part in enumerate(kept)]
        task.window_loss(joined(parts)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def tally(task: Clip, model: nn.Module) -> Gradients:
    found: Gradients = []

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.extend(p.grad.clone() for p in self.param_groups[0]["params"])

    task.configure_optimizer = lambda model: Keep(model.parameters(), lr=0.1)  # type: ignore[method-assign]
    Trainer("single", micro_batch_size=N, accumulate_grad_batches=K, max_epochs=1, shuffle=False).fit(task)
    return found


class ByMicroBatch(Task):
    """The recipe, with a loss for each micro-batch."""

    def __init__(self) -> None:
        self.views = DigitViews()

    def configure_model(self) -> nn.Module:
        return self.views.configure_model()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.views.configure_optimizer(model)

    def train_data(self) -> Any:
        return self.views.train_data()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.views.loss(model, batch)


def gradients() -> None:
    print("| accumulation | dropout | gradient of `logit_scale`, of the right one | encoders, relative error |")
    print("|---|--:|--:|--:|")
    for dropout in (0.0, 0.1):
        task = Clip(K * N, dropout=dropout)

        def found(how: Any, task: Clip = task) -> Gradients:
            torch.manual_seed(0)
            return how(task, task.configure_model())

        right = found(one_graph)
        names = [name for name, _ in task.configure_model().named_parameters()]
        scale = names.index("logit_scale")
        for how in (by_micro_batch, cached, tally):
            got = found(how)
            parts = [(a - b, b) for i, (a, b) in enumerate(zip(got, right, strict=True)) if i != scale]
            off, size = (torch.cat([pair[i].flatten() for pair in parts]).norm() for i in (0, 1))
            ratio = (got[scale] / right[scale]).item()
            print(f"| {how.__name__} | {dropout} | {ratio:.3f} | {(off / size).item():.1e} |", flush=True)


def recipe() -> None:
    print("| loss over | N x K | held-out images whose two views find one another among 360 |")
    print("|---|--:|--:|")
    torch.set_num_threads(1)
    for where, make, n, k in (
        ("the window", DigitViews, 128, 1),
        ("the window", DigitViews, 16, 8),
        ("each micro-batch", ByMicroBatch, 2, 64),
    ):
        trainer = Trainer("single", micro_batch_size=n, accumulate_grad_batches=k, max_epochs=20)
        trainer.fit(make())
        print(f"| {where} | {n} x {k} | {100 * retrieval(trainer.model, DigitViews()):.1f} % |", flush=True)


if __name__ == "__main__":
    recipe() if "--recipe" in sys.argv[1:] else gradients()
