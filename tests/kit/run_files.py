"""Files of a run that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(update: int, **others: Any) -> dict[str, Any]:
    return {
        "update": update,
        "epoch": 0,
        "samples": 8 * update,
        "skipped": 0,
        "weight": 8.0,
        "loss": 1 / update,
        "lr": 0.1,
        "grad_norm": 1.0,
        "accumulate_grad_batches": 2,
        "effective_batch": 8,
        "samples_per_second": 4.0,
        **others,
    }


def write(folder: Path, records: list[Any], events: list[Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    (folder / "config.json").write_text(json.dumps(config))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder
