"""From nothing to the first update: CPU seconds of fresh processes that import, build, make one update and end.

    python tests/benchmarks/start.py [--repetitions 7] [--imports]

Tally against a plain loop with the same model and data, alone and as two processes of DistributedDataParallel. The
repetitions are interleaved, and their medians compared. `--imports` lists what the import of Tally takes beside torch.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PLAIN = """
import torch
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(32, 32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(TensorDataset(torch.randn(64, 32), torch.randn(64, 32)), batch_size=8):
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    break
"""

PLAIN_DDP = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(32, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(64, 32), torch.randn(64, 32))
for x, y in DataLoader(data, batch_size=8, sampler=DistributedSampler(data)):
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    break
dist.destroy_process_group()
"""

TALLY = """
import torch
from torch.utils.data import TensorDataset

from engine import Task, Trainer


class Linear(Task):
    def configure_model(self):
        return torch.nn.Linear(32, 32)

    def configure_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def train_data(self):
        return TensorDataset(torch.randn(64, 32), torch.randn(64, 32))

    def loss(self, model, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(model(x), y)


Trainer(micro_batch_size=8, max_updates=1).fit(Linear())
"""

CASES = [
    ("import torch", 1, "import torch"),
    ("import torch, engine", 1, "import torch, engine"),
    ("import torch", 1, "import torch"),
    ("--help", 1, "from engine.cli.main import main; main(['--help'])"),
    ("plain loop", 1, PLAIN),
    ("Tally", 1, TALLY),
    ("plain loop, DDP", 2, PLAIN_DDP),
    ("Tally, DDP", 2, TALLY),
]
"""What, in how many processes, and its source. Each second one is compared with the one before."""


def cpu_seconds(P: int, source: str) -> float:
    """Return the CPU seconds, of user and system, of P processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fixed = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(P), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if P > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.DEVNULL,
            env={**fixed, **group, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(P)
    ]
    if any(statuses := [process.wait() for process in processes]):
        raise RuntimeError(f"{P} processes ended with {statuses}:\n{source}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_imports(most: int = 15) -> None:
    """Print the modules whose own import takes longest, of those that torch alone does not import."""
    command = [sys.executable, "-X", "importtime", "-c", "import torch; print('|', flush=True); import engine"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    rows = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)", done.stderr)
    names = [name for *_, name in rows]
    own = sorted(((int(self), name) for self, _, _, name in rows[names.index("torch") + 1 :]), reverse=True)
    print("\n| module | milliseconds of its own |\n| --- | --: |")
    for microseconds, name in own[:most]:
        print(f"| `{name}` | {microseconds / 1000:.1f} |")
    print(f"| all {len(own)} | {sum(microseconds for microseconds, _ in own) / 1000:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--imports", action="store_true", help="list what takes longest to import")
    options = parser.parse_args()
    for _, P, source in CASES[5:7]:
        cpu_seconds(P, source)  # the first compiles, and fills the disk's cache
    seconds: list[list[float]] = [[] for _ in CASES]
    for _ in range(options.repetitions):
        for i, (_, P, source) in enumerate(CASES):
            seconds[i].append(cpu_seconds(P, source))
    print(f"Medians of {options.repetitions} interleaved repetitions; the target is 1.15 or less.\n")
    print("| what | processes | CPU seconds | ratio |\n| --- | --: | --: | --: |")
    for i, (what, P, _) in enumerate(CASES):
        median = statistics.median(seconds[i])
        ratio = median / statistics.median(seconds[i - i % 2])
        print(f"| {what} | {P} | {median:.2f} | {ratio:.2f} |")
    if options.imports:
        print_imports()


if __name__ == "__main__":
    main()
