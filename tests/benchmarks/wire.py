"""What crosses the wire, and what that costs: Tally under DDP on two processes, beside a plain loop with `no_sync`.

    python tests/benchmarks/wire.py [--payload-only] [--repetitions 9]

- payload: the bytes that a process gives to collectives in one update, as a dispatch mode sees them;
- samples/s of two hosts at 200 Mbit/s (network namespaces: Linux, as root): one group of two processes makes short runs
  of all loops in turn; medians of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Task, Trainer
from strategies import DDPStrategy
from tests.benchmarks.problem import at_updates
from tests.kit.hosts import torchrun_on, two_hosts
from tests.kit.processes import run

WINDOWS = (1, 4, 16)
P, N, FEATURES = 2, 32, 1024
WARM_UP, MEASURED = 2, 8  # updates

loss_fn = nn.functional.mse_loss


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Stream:
    """One micro-batch, over and over, for as many updates as a run makes."""

    def __init__(self, K: int) -> None:
        self._length = (WARM_UP + MEASURED) * K

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        x, y = (torch.randn(N, FEATURES, generator=generator) for _ in "xy")
        return ((x, y) for _ in range(self._length))


def plain(K: int) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = make_optimizer(model)
    for i, (x, y) in enumerate(Stream(K), start=1):
        with nullcontext() if i % K == 0 else model.no_sync():
            (loss_fn(model(x), y) / K).backward()
        if i % K == 0:
            optimizer.step()
            optimizer.zero_grad()


class Autoencoder(Task):
    def __init__(self, K: int) -> None:
        self._K = K

    def configure_model(self) -> nn.Module:
        return make_model()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model)

    def train_data(self) -> Stream:
        return Stream(self._K)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return loss_fn(model(x), y)


def tally(K: int, hook: str | None = None) -> None:
    strategy = DDPStrategy(communication_hook=hook)
    Trainer(strategy, N, accumulate_grad_batches=K, max_updates=WARM_UP + MEASURED).fit(Autoencoder(K))


def at_both_ends(train: Callable[[], None], read: Callable[[], float]) -> list[float]:
    """Return what `read` gives where the measured updates of `train` begin and end."""
    seen: list[float] = []

    def see() -> None:
        seen.append(read())

    with at_updates({WARM_UP: see, WARM_UP + MEASURED: see}):
        train()
    return seen


PLAIN, TALLY, HALVED = "plain loop", "Tally", "Tally, fp16 hook"
LOOPS: dict[str, Callable[[int], None]] = {PLAIN: plain, TALLY: tally, HALVED: partial(tally, hook="fp16")}


# The payload


class Payload(TorchDispatchMode):
    """Counts the bytes that this process gives to collectives: the last tensors among a collective's arguments."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = [argument for argument in args if isinstance(argument, list)][-1]  # of a gather, outputs are first
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given)
        return func(*args, **(kwargs or {}))


def payload(name: str, K: int) -> float:
    """Return this process's bytes per update, between two updates so that no start or end is counted."""
    with Payload() as mode:
        before, after = at_both_ends(partial(LOOPS[name], K), lambda: mode.bytes)
    return (after - before) / MEASURED


def print_payload() -> None:
    gradients = 4 * sum(p.numel() for p in make_model().parameters())
    print(f"Bytes given to collectives per update and process; the gradients have {gradients:,}.\n")
    print(f"| loop | {' | '.join(f'K={K}' for K in WINDOWS)} |\n| --- |{' --: |' * len(WINDOWS)}")
    for name in LOOPS:
        print(f"| {name} | {' | '.join(f'{max(run(P, payload, name, K)):,.0f}' for K in WINDOWS)} |")


# Two hosts


def rates(repetitions: int) -> None:
    """Print what each run made, on process 0: started by torchrun on each of two hosts."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for repetition in range(repetitions):
        for K, name in product(WINDOWS, list(LOOPS)[:: 1 if repetition % 2 else -1]):
            dist.barrier()
            began, ended = at_both_ends(partial(LOOPS[name], K), time.perf_counter)
            if dist.get_rank() == 0:
                print("rate", name, K, P * N * K * MEASURED / (ended - began), sep="\t", flush=True)
    dist.destroy_process_group()


def print_rates(repetitions: int) -> None:
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        command = (__file__, f"--rates={repetitions}")
        with torchrun_on(hosts, *command, folder=Path(folder)) as torchruns:
            for each in torchruns:
                assert each.wait(100 * repetitions) == 0, each.output
            lines = [line.split("\t")[1:] for line in torchruns[0].output.splitlines() if line.startswith("rate\t")]
    print(f"\nSamples/s of two hosts at 200 Mbit/s, N={N}: medians of {repetitions} runs of each in turn.\n")
    print(f"| K | {PLAIN} | {TALLY} | ratio | from, to | {HALVED} | ratio |\n{'| --: ' * 7}|")
    for K in WINDOWS:
        of = {name: [float(rate) for n, k, rate in lines if (n, k) == (name, str(K))] for name in LOOPS}
        exact, halved = (sorted(b / a for a, b in zip(of[PLAIN], of[n], strict=True)) for n in (TALLY, HALVED))
        median = statistics.median
        print(
            f"| {K} | {median(of[PLAIN]):,.0f} | {median(of[TALLY]):,.0f} | {median(exact):.3f} "
            f"| {exact[0]:.3f} to {exact[-1]:.3f} | {median(of[HALVED]):,.0f} | {median(halved):.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payload-only", action="store_true", help="no two hosts")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--rates", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rates:
        rates(options.rates)
        return
    print_payload()
    if not options.payload_only:
        try:
            print_rates(options.repetitions)
        except pytest.skip.Exception as reason:
            print(f"\nNot measured: {reason}.")


if __name__ == "__main__":
    main()
