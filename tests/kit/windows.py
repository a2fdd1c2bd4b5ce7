"""Tasks with a loss over a window, and their reference: one graph over the outputs of all its micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine import Trainer
from engine.seeds import ODD, SEED_BITS, forward_seed
from engine.window_task import Added, Rows, Shared, WindowTask
from tests.kit.recorders import Watch
from tests.kit.reference import parameters

SAMPLES, N = 22, 3


class TwoTowers(nn.Module):
    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(6)] if norm else []
        self.image = nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4))
        self.text = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4))
        self.logit_scale = nn.Parameter(torch.tensor([0.7]))  # FSDP takes no 0-dim parameters

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            nn.functional.normalize(self.image(x), dim=1),
            nn.functional.normalize(self.text(y), dim=1),
            self.logit_scale.exp(),
        )


class Clip(WindowTask):
    """Symmetric contrastive loss with a learnt scale."""

    def __init__(self, samples: int = SAMPLES, dropout: float = 0.0, norm: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
        self.y = self.x + 0.3 * torch.randn(samples, 5, generator=generator, dtype=torch.float64)
        self.dropout, self.norm = dropout, norm

    def configure_model(self) -> nn.Module:
        return TwoTowers(self.dropout, self.norm).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.3)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(self.x, self.y)

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        image, text, _ = model(*batch)
        scale = model.logit_scale.exp()
        return {"image": Rows(image), "text": Rows(text), "scale": Shared(scale)}

    def window_loss(self, outputs: Any) -> Tensor:
        logits = outputs["scale"] * outputs["image"] @ outputs["text"].T
        target = torch.arange(len(logits)).to(logits.device)
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


class ShardedClip(Clip):
    def outputs(self, model: nn.Module, batch: Any) -> Any:
        image, text, scale = model(*batch)
        return {"image": Rows(image), "text": Rows(text), "scale": Shared(scale)}


class Mixture(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 15), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chances = self.router(x).softmax(1)
        return (chances[:, :, None] * self.experts(x).view(-1, 3, 5)).sum(1), chances


class Balance(Clip):
    """A regression by a mixture of experts, with the load balance of its router over the window."""

    def configure_model(self) -> nn.Module:
        return Mixture(self.dropout).double()

    def outputs(self, model: Any, batch: Any) -> Any:
        x, y = batch
        guess, chances = model(x)
        chosen = nn.functional.one_hot(chances.argmax(1), 3).sum(0)
        error, n = ((guess - y) ** 2).sum(), torch.tensor(len(x))
        return {"error": Added(error), "n": Added(n), "chances": Added(chances.sum(0)), "chosen": Added(chosen)}

    def window_loss(self, outputs: Any) -> Tensor:
        n = outputs["n"]
        return outputs["error"] / n + 0.1 * 3 * (outputs["chosen"] / n * outputs["chances"] / n).sum()


class Dice(Clip):
    """Dice over the window: a ratio of sums."""

    def configure_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(6, 1), nn.Sigmoid()
        ).double()

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        x, y = batch
        p, t = model(x)[:, 0], (y.sum(1) > 0).double()
        return {"both": Added((p * t).sum()), "p": Added(p.sum()), "t": Added(t.sum())}

    def window_loss(self, outputs: Any) -> Tensor:
        return 1 - 2 * outputs["both"] / (outputs["p"] + outputs["t"])


def reference(task: Any, window: int, epochs: int = 2, clip: float | None = None, P: int = 1) -> Any:
    """One graph over a window's micro-batches, with the engine's seeds; only process 0's forwards move the buffers."""
    torch.manual_seed(0)
    model, losses = task.configure_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for epoch in range(epochs):
        for start in range(0, len(task.x), window):
            found = []
            for number, first in enumerate(range(start, stop := min(start + window, len(task.x)), N)):
                torch.manual_seed(forward_seed(0, epoch) + first * ODD & SEED_BITS)
                rows, before = slice(first, min(first + N, stop)), [b.clone() for b in model.buffers()]
                found.append(task.outputs(model, (task.x[rows], task.y[rows])))
                if number % P:
                    for buffer, value in zip(model.buffers(), before, strict=True):
                        buffer.data = value
            joined = {}
            for name, output in found[0].items():
                parts = [outputs[name].tensor for outputs in found]
                kind = type(output)
                joined[name] = torch.cat(parts) if kind is Rows else sum(parts) if kind is Added else parts[0]
            loss = task.window_loss(joined)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
    return parameters(model), losses, [b.double() for b in model.buffers()]


def trained(
    task: Any, strategy: Any, K: int, clip: float | None = None, **settings: Any
) -> tuple[Tensor, Trainer, list[Any]]:
    """Train two epochs in order; return the whole parameters, the trainer and the records."""
    watch = Watch()
    trainer = Trainer(
        strategy() if callable(strategy) else strategy,
        micro_batch_size=N,
        accumulate_grad_batches=K,
        max_epochs=2,
        shuffle=False,
        callbacks=watch,
        gradient_clip_norm=clip,
        **settings,
    )
    trainer.fit(task)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole]), trainer, watch.records


def fit(task: Any, strategy: Any, K: int, clip: float | None = None, **settings: Any) -> Any:
    found, trainer, records = trained(task, strategy, K, clip, **settings)
    return found, [record["loss"] for record in records], [b.double() for b in trainer.model.buffers()]
