"""What a report of a long run costs: seconds of one core, and bytes, for 100,000 updates.

python tests/benchmarks/report.py
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.report import page, read

UPDATES = 100_000


def record(update: int, draw: random.Random) -> dict[str, float]:
    return {
        "update": update,
        "epoch": update // 10_000,
        "samples": 256 * update,
        "skipped": update // 5_000,
        "weight": draw.uniform(900, 1100),
        "loss": draw.uniform(1, 2),
        "lr": 0.001 * update / UPDATES,
        "grad_norm": draw.uniform(0, 1),
        "accumulate_grad_batches": 2,
        "effective_batch": 256,
        "samples_per_second": draw.uniform(5_000, 6_000),
    }


def main() -> None:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder, "metrics.jsonl")
        history.write_text("".join(json.dumps(record(update, draw)) + "\n" for update in range(1, UPDATES + 1)))
        begin = time.process_time()
        run = read(folder)
        middle = time.process_time()
        html = page([run])
        end = time.process_time()
        print(f"{UPDATES:,} updates, {history.stat().st_size / 1e6:.1f} MB of metrics.jsonl")
        print(f"read {middle - begin:.2f} s, page {end - middle:.2f} s, {len(html.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
