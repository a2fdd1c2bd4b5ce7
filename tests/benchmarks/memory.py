"""Peak memory does not grow with K: Tally at K=64 against K=2, over the same number of micro-batches.

    python tests/benchmarks/memory.py

`stream` and `dataset` weigh losses by samples, `tokens` is a stream whose weights are known late. A micro-batch (1 MiB)
and its activations are made anew each time, so that a window that is held shows at once: it adds 62 MiB, a ratio of
1.18. Each figure is the peak resident memory of a process of its own (of the larger one of the two for DDP).
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WINDOWS = (2, 64)
MICRO_BATCHES = 256
N, FEATURES = 256, 1024
TARGET = 1.01
STRATEGIES = ("single", "ddp")

# The allocator gives memory back at once, so that a peak tells what was in use at a time. The fewer arenas and
# threads, the less its luck matters.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def peak(strategy: str, data: str, K: int) -> float:
    """Return the peak of a run in MiB. This process stays small: on Linux a child's peak begins with its parent's."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start = [sys.executable, *(torchrun if strategy == "ddp" else []), __file__, strategy, data, str(K)]
    done = subprocess.run(start, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(start)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return max(int(kibibytes) for kibibytes in re.findall(r"peak (\d+)", done.stdout)) / 1024


def train(strategy: str, kind: str, K: int) -> None:
    """Train a model of 8 MiB on MICRO_BATCHES micro-batches per process, and print this process's peak."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch
    from torch import Tensor, nn

    from engine import Loss, Task, Trainer

    def sample(size: int, seed: int) -> Tensor:
        return torch.rand(size, FEATURES, generator=torch.Generator().manual_seed(seed))

    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            first = MICRO_BATCHES * int(os.environ.get("RANK", "0"))  # each process has its own part
            return (sample(N, first + i) for i in range(MICRO_BATCHES))

    class Dataset(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return MICRO_BATCHES * N * (2 if strategy == "ddp" else 1)

        def __getitem__(self, index: int) -> Tensor:
            return torch.full((FEATURES,), index / len(self))

    class Autoencoder(Task):
        def configure_model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES))

        def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def train_data(self) -> Stream | Dataset:
            return Dataset() if kind == "dataset" else Stream()

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor | Loss:
            if kind != "tokens":
                return nn.functional.mse_loss(model(batch), batch)
            valid = batch > 0.5  # a weight that is known when the micro-batch is there
            return Loss(((model(batch) - batch) ** 2 * valid).sum(), valid.sum())

    trainer = Trainer(strategy, N, accumulate_grad_batches=K, max_epochs=1)
    trainer.fit(Autoencoder())
    assert trainer.update == MICRO_BATCHES // K, f"{trainer.update} updates"
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def main() -> None:
    fewest, most = WINDOWS
    print(f"Peak memory in MiB over {MICRO_BATCHES} micro-batches per process; the target is {TARGET} or less.\n")
    print(f"| data | {' | '.join(f'{strategy}: K={fewest}, K={most} (ratio)' for strategy in STRATEGIES)} |")
    print("| --- |" + " --: |" * len(STRATEGIES))
    for data in ("stream", "dataset", "tokens"):
        cells = []
        for strategy in STRATEGIES:
            small, large = (peak(strategy, data, K) for K in WINDOWS)
            cells.append(f"{small:.1f}, {large:.1f} ({large / small:.3f})")
        print(f"| {data} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
