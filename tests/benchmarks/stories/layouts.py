"""One model on P x K = 1 x 8, 2 x 4 and 4 x 2, by Tally and by the plain DDP loop: how far are the runs apart?

    python tests/benchmarks/stories/layouts.py

The recipe `digits`, with dropout, AdamW and clipping. An epoch of 1,437 samples is eleven windows of 128 and one of 29:
a micro-batch of 16 and one of 13.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from engine import Trainer
from launch.recipes.digits import Digits
from tests.benchmarks.stories.picture import Panel, draw, tell
from tests.kit.processes import run
from tests.kit.reference import Watch, parameters

LAYOUTS = ((1, 8), (2, 4), (4, 2))
N, EPOCHS, MAX_NORM = 16, 6, 1.0

Run = tuple[list[float], Tensor]
"""The loss of each update, and all parameters at the end."""


class DigitsOf(Digits):
    """The recipe, in float32 or float64, on all samples or the first few."""

    def __init__(self, dtype: torch.dtype, samples: int | None) -> None:
        super().__init__()
        self.dtype, self.samples = dtype, samples

    def configure_model(self) -> nn.Module:
        return super().configure_model().to(self.dtype)

    def train_data(self) -> TensorDataset:
        images, digits = super().train_data().tensors
        return TensorDataset(images[: self.samples].to(self.dtype), digits[: self.samples])

    def validation_data(self) -> None:
        return None


def tally(K: int, dtype: torch.dtype, epochs: int, samples: int | None) -> Run:
    watch = Watch()
    trainer = Trainer("ddp", N, K, max_epochs=epochs, gradient_clip_norm=MAX_NORM, callbacks=watch)
    trainer.fit(DigitsOf(dtype, samples))
    return [record["loss"] for record in watch.records], parameters(trainer.model)


def plain(K: int, dtype: torch.dtype, epochs: int, samples: int | None) -> Run:
    """The loop of many tutorials: averages of averages, and each process draws from its own generator."""
    rank, P = dist.get_rank(), dist.get_world_size()
    task = DigitsOf(dtype, samples)
    torch.manual_seed(0)
    model = DistributedDataParallel(task.configure_model())
    torch.manual_seed(rank)
    sampler: Any = DistributedSampler(task.train_data(), P, rank)
    loader = DataLoader(task.train_data(), N, sampler=sampler)
    task.total_updates = epochs * -(-len(loader) // K)
    optimizer, lr_scheduler = task.configure_optimizer(model)
    losses, window = [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(loader, start=1):
            is_last = i % K == 0 or i == len(loader)
            with nullcontext() if is_last else model.no_sync():
                loss = task.loss(model, batch)
                (loss / K).backward()
            window.append(loss.detach())
            if is_last:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                mean = torch.stack(window).mean()
                dist.all_reduce(mean)
                losses.append(mean.item() / P)
                window.clear()
    return losses, parameters(model)


def on_all_layouts(loop: Any, dtype: torch.dtype, epochs: int = EPOCHS, samples: int | None = None) -> list[Run]:
    """Return what process 0 of each layout returned."""
    return [run(P, loop, K, dtype, epochs, samples, seconds=600)[0] for P, K in LAYOUTS]


def differences(runs: list[Run]) -> list[tuple[list[float], float]]:
    """Of each run from the first: of the loss at each update, and of the parameters at the end the largest."""
    (losses, end), *others = runs
    return [
        ([abs(a - b) for a, b in zip(losses, found, strict=True)], (end - other).abs().max().item())
        for found, other in others
    ]


def figures(loops: dict[str, list[Run]]) -> str:
    """Return the table of the largest differences."""
    lines = [
        "Largest difference from 1 x 8 in the run.",
        "",
        "| | P x K | loss | parameters |",
        "| --- | --- | --: | --: |",
    ]
    for name, runs in loops.items():
        for (P, K), (losses, end) in zip(LAYOUTS[1:], differences(runs), strict=True):
            lines.append(f"| {name} | {P} x {K} | {max(losses):.1e} | {end:.1e} |")
    losses = loops["Tally, float32"][0][0]
    return "\n".join(
        [*lines, "", f"{len(losses)} updates; Tally's loss goes from {losses[0]:.3f} to {losses[-1]:.4f}."]
    )


def picture(loops: dict[str, list[Run]]) -> str:
    """Return the curves of Tally and the plain loop, and below them their differences."""
    high = 1.02 * max(max(losses) for runs in loops.values() for losses, _ in runs)

    def curve(values: list[float]) -> list[tuple[float, float]]:
        return list(enumerate(values, start=1))

    def above(name: str, title: str) -> Panel:
        return Panel(title, [(i, curve(losses)) for i, (losses, _) in enumerate(loops[name])], 0, high)

    def below(*names: str, notes: Any = ()) -> Panel:
        found = [
            (i, curve(losses)) for name in names for i, (losses, _) in enumerate(differences(loops[name]), start=1)
        ]
        return Panel("difference of the loss from 1 x 8", found, 1e-18, 10, log=True, notes=notes)

    notes = [(0.4, 1e-4, "float32"), (0.4, 1e-13, "float64")]
    return draw(
        "The loss on three layouts, by Tally and by the plain DDP loop",
        [f"P x K = {P} x {K}" for P, K in LAYOUTS],
        [
            [above("Tally, float32", "loss, Tally"), above("plain loop, float32", "loss, plain DDP loop")],
            [below("Tally, float32", "Tally, float64", notes=notes), below("plain loop, float32")],
        ],
    )


def main() -> None:
    loops = {
        "Tally, float32": on_all_layouts(tally, torch.float32),
        "Tally, float64": on_all_layouts(tally, torch.float64),
        "plain loop, float32": on_all_layouts(plain, torch.float32),
    }
    tell("layouts", figures(loops), picture(loops))


if __name__ == "__main__":
    main()
