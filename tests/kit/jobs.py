"""A job for torchrun, slow enough to be hit, and what it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.kit.hosts import Started, until

UPDATES = 320


EVERY = 5  # updates between checkpoints


PAUSE = 0.01  # seconds of a loss, so that there is something to hit


JOB = f'''
"""{UPDATES} updates: 10 epochs of 31 windows of 16 samples and one of 4, in which one of two processes has none."""

import sys
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

from engine import Callback, Task, Trainer
from engine.signals import EXIT_STATUS
from strategies import DDPStrategy


class Job(Task):
    def __init__(self, pause: float = {PAUSE}) -> None:
        self.pause = pause

    def configure_model(self):
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1)).double()

    def configure_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_data(self):
        x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return TensorDataset(x, torch.sin(3 * x.sum(1, keepdim=True)))

    def loss(self, model, batch):
        time.sleep(self.pause)
        x, y = batch
        return nn.functional.mse_loss(model(x), y)


class Trace(Callback):
    """Keeps what each process has done, over all attempts."""

    def on_fit_start(self, trainer):
        self.file = open(f"trace-{{trainer.strategy.rank}}", "a", buffering=1)
        self.file.write(f"from {{trainer.update}}\\n")

    def on_update_end(self, trainer):
        self.file.write(f"{{trainer.update}}\\n")


if __name__ == "__main__":
    pause, patience = map(float, sys.argv[1:])
    strategy = DDPStrategy(timeout_seconds=patience)
    trainer = Trainer(strategy, 4, 2, max_epochs=10, callbacks=Trace(), run_dir="run", save_every_n_updates={EVERY})
    trainer.fit(Job(pause))
    with open(f"trace-{{trainer.strategy.rank}}", "a") as file:
        file.write(f"interrupted {{trainer.interrupted_by}}\\n" if trainer.interrupted_by else "done\\n")
    sys.exit(EXIT_STATUS if trainer.interrupted_by else 0)
'''


OPTIONS = (
    "--task=job.Job",
    "--trainer.callbacks=job.Trace",
    "--trainer.micro_batch_size=4",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.max_epochs=10",
    f"--trainer.save_every_n_updates={EVERY}",
)
"""What the script says, for the command line."""


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, less what the clock says."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{name: v for name, v in json.loads(line).items() if name != "samples_per_second"} for line in lines]


def reach(run: Path, update: int, torchrun: Started) -> None:
    """Wait until metrics.jsonl has an update."""

    def has_reached() -> bool:
        assert torchrun.process.poll() is None, torchrun.output
        return (run / "metrics.jsonl").exists() and any(record["update"] >= update for record in records(run)[-1:])

    until(has_reached, 90, f"update {update}")
