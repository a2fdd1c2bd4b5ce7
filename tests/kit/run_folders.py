"""Short runs for tests of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import Trainer
from tests.kit.killed import Full, N


def fit(folder: Path, strategy: str = "single", **options: Any) -> Trainer:
    task = options.pop("task", None) or Full(normalises=False, adaptive=False)
    chosen = {"micro_batch_size": N, "max_epochs": 1, "save_every_n_updates": 5, **options}
    trainer = Trainer(strategy, run_dir=str(folder), **chosen)
    trainer.fit(task)
    return trainer
