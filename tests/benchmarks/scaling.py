"""How well the model of `engine/scaling.py` predicts updates/s: calibrated from one run, beside real runs of others.

    python tests/benchmarks/scaling.py [--updates 6]

P = 1, 2, 4 processes on two hosts at 200 Mbit/s (network namespaces: Linux, as root), K = 1, 4, 16. The link is
measured by two all-reduces between two processes, the rest is the summary.json of the run with P = 2, K = 4.

A micro-batch's work is real and small; beside it, forward and backward sleep, as processors of their own would work:
four processes would disturb each other on fewer processors, which the model does not describe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Callback, Task, Trainer
from tests.benchmarks.scaling_model import Link, Scaling, calibrated
from tests.kit.hosts import Host, torchrun_on, two_hosts

PROCESSES, WINDOWS, CALIBRATION = (1, 2, 4), (1, 4, 16), (2, 4)
N, FEATURES, LAYERS = 2, 768, 2
FORWARD, BACKWARD = 0.005, 0.010  # seconds of sleep per layer
WARM_UP = 2  # updates
BEYOND = ((8, 4), (8, 16), (2, 64))
"""(P, K) that are predicted and not measured."""


class Work(torch.autograd.Function):
    """Takes time, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(BACKWARD)
        return gradient


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(Work.apply(self.linear(x)))


class Stream:
    def __iter__(self) -> Iterator[Tensor]:
        x = torch.randn(N, FEATURES)
        while True:
            yield x


class Layers(Task):
    def configure_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, FEATURES), *(Layer() for _ in range(LAYERS)))

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)

    def train_data(self) -> Stream:
        return Stream()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()


class Times(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_update_end(self, trainer: Any) -> None:
        self.seen.append(time.perf_counter())


def runs(updates: int, folder: Path) -> None:
    """Write updates/s of each K into `folder`, and the link where there is one to measure: what torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    P, is_first = dist.get_world_size(), dist.get_rank() == 0
    if (P, is_first) == (CALIBRATION[0], True):
        (folder / "link.json").write_text(json.dumps(_link()))
    elif CALIBRATION[0] == P:
        _link()
    for K in WINDOWS:
        times = Times()
        settings: Any = {"callbacks": times, "save_every_n_minutes": None, "run_dir": str(folder / f"{P}-{K}")}
        Trainer("ddp", N, accumulate_grad_batches=K, max_updates=WARM_UP + updates, **settings).fit(Layers())
        if is_first:
            rate = updates / (times.seen[-1] - times.seen[WARM_UP - 1])
            (folder / f"rate-{P}-{K}.json").write_text(json.dumps(rate))
    dist.destroy_process_group()


def _link() -> Link:
    """Measure what an all-reduce of two processes takes: with one element it is two messages."""
    seconds = [_all_reduce_seconds(size) for size in (1, 2_000_000)]
    return Link(4 * 2_000_000 / (seconds[1] - seconds[0]), seconds[0] / 2)


def _all_reduce_seconds(elements: int) -> float:
    tensor, seen = torch.zeros(elements), []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        seen.append(time.perf_counter() - began)
    return statistics.median(seen[1:])


def measure(hosts: Sequence[Host], P: int, updates: int, folder: Path) -> None:
    used = hosts[:P]
    command = (f"--nproc-per-node={P // len(used)}", __file__, f"--folder={folder}", f"--updates={updates}")
    with torchrun_on(used, *command, folder=folder) as torchruns:
        for each in torchruns:
            assert each.wait(400) == 0, each.output


def print_table(model: Scaling, measured: dict[tuple[int, int], float]) -> None:
    link, (P0, K0) = model.link, CALIBRATION
    print(f"{model.size:,} bytes in {model.collectives} collectives; calibrated at P={P0}, K={K0}:")
    print(f"a micro-batch {1000 * model.micro_batch:.1f} ms, step {1000 * model.step:.1f} ms, ", end="")
    print(f"{8e-6 * link.bandwidth:.0f} Mbit/s, latency {1000 * link.latency:.2f} ms, ", end="")
    print(f"overlap {1000 * model.overlap:.1f} ms.\n")
    print("| P | K | updates/s predicted | measured | error |\n| --: | --: | --: | --: | --: |")
    errors = []
    for (P, K), rate in measured.items():
        predicted = 1 / model.seconds(P, K)
        error, here = predicted / rate - 1, " (calibration)" if (P, K) == CALIBRATION else ""
        errors += [] if here else [abs(error)]
        print(f"| {P} | {K} | {predicted:.3f} | {rate:.3f} | {error:+.1%}{here} |")
    for P, K in BEYOND:
        print(f"| {P} | {K} | {1 / model.seconds(P, K):.3f} | | extrapolation |")
    print(f"\nError, calibration aside: {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        runs(options.updates, options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with two_hosts() as hosts:
                for P in PROCESSES:
                    measure(hosts, P, options.updates, folder)
        except pytest.skip.Exception as reason:
            print(f"Not measured: {reason}.")
            return
        P, K = CALIBRATION
        link = Link(*json.loads((folder / "link.json").read_text()))
        model = calibrated(json.loads((folder / f"{P}-{K}" / "summary.json").read_text()), link)
        measured = {
            (P, K): json.loads((folder / f"rate-{P}-{K}.json").read_text()) for P, K in product(PROCESSES, WINDOWS)
        }
        print_table(model, measured)


if __name__ == "__main__":
    main()
