"""What keeping a run costs: the same training with and without checkpoints, side by side, and going on from one.

    python tests/benchmarks/checkpoints.py

A model of 2.1 million parameters with AdamW (25 MB of state) on one CPU thread. The runs take turns, and the least time
of each counts. Seconds are this machine's; what to look at is the share.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from engine import Task, Trainer

WIDTH, UPDATES, EVERY, ROUNDS = 1024, 60, 10, 3


class Autoencoder(Task):
    def configure_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), fused=True)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(torch.rand(UPDATES * 256, WIDTH))

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(model(batch[0]), batch[0])


def train(folder: str, every: int | None, max_updates: int = UPDATES) -> tuple[float, Trainer]:
    """Return the seconds of a run that saves after each n-th update and at its end."""
    trainer = Trainer(
        "single",
        micro_batch_size=64,
        accumulate_grad_batches=4,
        max_epochs=2,
        max_updates=max_updates,
        run_dir=folder,
        save_every_n_updates=every,
        save_every_n_minutes=None,
    )
    started = time.perf_counter()
    trainer.fit(Autoencoder())
    return time.perf_counter() - started, trainer


def main() -> None:
    torch.set_num_threads(1)
    without, with_saves, resumed, stalls = [], [], [], []
    with tempfile.TemporaryDirectory() as parent:
        for number in range(ROUNDS):
            without.append(train(f"{parent}/a{number}", None)[0])
            seconds, trainer = train(f"{parent}/b{number}", EVERY)
            with_saves.append(seconds)
            stalls.append(trainer.costs["seconds_stalled_by_saves"] / trainer.costs["saves"])
            resumed.append(train(f"{parent}/b{number}", None)[0])  # finds that it is over
        size = sum(f.stat().st_size for f in Path(parent, "a0", "checkpoints").rglob("*") if f.is_file())
    saves = UPDATES // EVERY - 1
    a_save = (min(with_saves) - min(without)) / saves
    print(f"one checkpoint: {size / 1e6:.1f} MB on disk\n")
    print("| | seconds |\n| --- | --: |")
    print(f"| {UPDATES} updates, saved at the end | {min(without):.2f} |")
    print(f"| the same, saved {saves} times more | {min(with_saves):.2f} |")
    print(f"| one save, in all | {a_save:.3f} |")
    print(f"| of which training waits | {min(stalls):.3f} |")
    print(f"| resuming from a checkpoint: start, read, verify, load | {min(resumed):.2f} |")
    print(f"\nOne save costs {100 * a_save / (10 * 60):.3f} % of the ten minutes between two (the default).")


if __name__ == "__main__":
    main()
