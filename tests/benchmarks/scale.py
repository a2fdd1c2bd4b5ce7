"""The cost of Tally's own messages as P grows: counted on one host at P = 2 to 64, beside a plain DDP loop.

    python tests/benchmarks/scale.py [--processes 2 4 8 16 32 64] [--latency-us 20] [--json FILE]

All processes run in a network namespace of their own (Linux, as root), so that its counters are theirs. A message is a
TCP segment with data. Per update they are counted between two updates of the same run, at rank 0, and divided by P.
CPU is that of processes: it counts work, not waiting, but on a busy machine switching adds to it. The second table is
arithmetic on the first one and a stated latency: nothing in it was run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a network of its own has no names, and torch warns of that

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import Task, Trainer
from engine.order import SLICE, KeyedPermutation
from engine.update.message import HEADER
from strategies import MESSAGE_MAXIMA, DDPStrategy
from strategies.process_group import LARGEST_MESH
from strategies.summed_message import LIMBS
from tests.benchmarks.problem import at_updates, loss_fn, make_model, make_optimizer
from tests.kit.processes import run

PROCESSES = (2, 8, 16, 64)
LARGE = (64, 1024, 10_000)
N, FEATURES, WARM_UP, MEASURED = 2, 32, 10, 60
MESSAGES = 100  # of the engine, alone
CLONE_NEWNET = 0x40000000


def leave_network() -> bool:
    """Move this process and its children to a network of their own; False if that is not allowed."""
    if not sys.platform.startswith("linux") or ctypes.CDLL(None).unshare(CLONE_NEWNET):
        return False
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return True


def traffic() -> tuple[int, int]:
    """Return the TCP segments with data, and all bytes with headers, that this network has carried."""
    found: dict[str, int] = {}
    for file in ("/proc/net/snmp", "/proc/net/netstat"):
        lines = Path(file).read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if names.startswith("Tcp"):
                found |= dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    carried = Path("/proc/net/dev").read_text().split("lo:")[1].split()
    return found["InSegs"] - found["TCPPureAcks"], int(carried[0])


def sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))


class See:
    """The counters of this process, and of the network, at several points of a run."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []
        self()

    def __call__(self) -> None:
        self.seen.append((time.perf_counter(), time.process_time(), time.thread_time(), sockets(), *traffic()))


class Stream:
    """One micro-batch, over and over."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x = torch.ones(N, FEATURES)
        return iter([(x, x)] * (WARM_UP + MEASURED + 1))


class Tiny(Task):
    def configure_model(self) -> nn.Module:
        return make_model()

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model)

    def train_data(self) -> Stream:
        return Stream()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return loss_fn(model(x), y)


def plain() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(make_model())
    optimizer = make_optimizer(model)
    for x, y in Stream():
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()  # the process ends with its group: destroying that before the wrapper hangs now and then


def tally() -> None:
    Trainer(DDPStrategy(device="cpu"), N, max_updates=WARM_UP + MEASURED + 1).fit(Tiny())


def trained(train: Callable[[], None], port: int) -> list[tuple[float, ...]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    see = See()
    with at_updates({1: see, WARM_UP: see, WARM_UP + MEASURED: see}):
        train()
    return see.seen


def alone(port: int) -> list[tuple[float, ...]]:
    """The update's message without anything else."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    strategy = DDPStrategy(device="cpu")
    strategy.setup()
    message = [0.0] * (HEADER + MESSAGE_MAXIMA)
    for _ in range(WARM_UP):
        strategy.exchange(message)()
    see = See()
    for _ in range(MESSAGES):
        strategy.exchange(message)()
    see()
    strategy.barrier()
    strategy.teardown()
    return see.seen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def per(rows: list[list[tuple[float, ...]]], start: int, stop: int, times: int) -> dict[str, float]:
    """Return what happened between two points, on average of the processes, divided by `times`."""
    P, first = len(rows), rows[0]

    def of_all(which: int) -> float:
        return statistics.mean(row[stop][which] - row[start][which] for row in rows) / times

    return {
        "seconds": of_all(0),
        "cpu": of_all(1),
        "main": of_all(2),
        "sockets": max(row[stop][3] for row in rows),
        "messages": (first[stop][4] - first[start][4]) / P / times,
        "bytes": (first[stop][5] - first[start][5]) / P / times,
    }


def measured(P: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, train in (("plain", plain), ("tally", tally)):
        rows = run(P, trained, train, free_port(), seconds=120 + 20 * P, group=False)
        found[f"{name} start"], found[name] = per(rows, 0, 1, 1), per(rows, 2, 3, MEASURED)
    found["message"] = per(run(P, alone, free_port(), seconds=120 + 20 * P, group=False), 0, 1, MESSAGES)
    return found


def print_measured(results: dict[int, dict[str, dict[str, float]]]) -> None:
    print("| P | per update: messages, plain | Tally | kB, plain | Tally | CPU us, plain | Tally |", end=" ")
    print("the message alone: messages | kB | main thread us |")
    print("| --: " * 10 + "|")
    for P, found in results.items():
        pair = [found["plain"], found["tally"]]
        cells = [f"{one['messages']:.1f}" for one in pair] + [f"{one['bytes'] / 1e3:.1f}" for one in pair]
        cells += [f"{1e6 * one['cpu']:,.0f}" for one in pair]
        own = found["message"]
        cells += [f"{own['messages']:.1f}", f"{own['bytes'] / 1e3:.1f}", f"{1e6 * own['main']:,.0f}"]
        print(f"| {P} | {' | '.join(cells)} |")
    print("\n| P | sockets, plain | Tally | up to the first update: messages, plain | Tally | CPU ms, plain | Tally |")
    print("| --: " * 7 + "|")
    for P, found in results.items():
        pair = [found["plain start"], found["tally start"]]
        cells = [f"{found[name]['sockets']:.0f}" for name in ("plain", "tally")]
        cells += [f"{one['messages']:,.0f}" for one in pair] + [f"{1e3 * one['cpu']:,.1f}" for one in pair]
        print(f"| {P} | " + " | ".join(cells) + " |")


def print_order() -> None:
    """The order without memory: seconds to begin, and microseconds of CPU a sample."""
    print("\n| samples | us to begin | CPU us a sample, in slices |\n| --: | --: | --: |")
    for samples in (10**8, 10**10, (1 << 34) + 1):
        began = time.perf_counter()
        order = KeyedPermutation(samples, 0, 0)
        ready, start = time.perf_counter() - began, time.process_time()
        for index in range(30):
            order[index * SLICE : (index + 1) * SLICE]
        spent = (time.process_time() - start) / (30 * SLICE)
        print(f"| {samples:,} | {1e6 * ready:,.0f} | {1e6 * spent:.2f} |")


def print_projected(results: dict[int, dict[str, dict[str, float]]], latency: float) -> None:
    """Arithmetic: messages that wait for one another, log2 P of them in a tree and in an update that adds up."""
    largest = max(results)
    a_step = results[largest]["message"]["cpu"] / steps_of(largest)
    print(f"\nArithmetic, at {latency * 1e6:g} us from process to process and {a_step * 1e6:.0f} us of CPU a step:\n")
    columns = "the update's message: steps | ms on the way | CPU ms | kB sent | agreement at the start: steps | ms"
    print(f"| P | {columns} | sockets |\n" + "| --: " * 8 + "|")
    for P in LARGE:
        steps, start = steps_of(P), math.ceil(math.log2(P))
        kB = 8 * (1 + LIMBS * HEADER + MESSAGE_MAXIMA) * steps / 1e3
        connections = 2 * (P - 1) if P <= LARGEST_MESH else 2 * (2 * start + 2)
        cells = [f"{steps}", f"{1e3 * latency * steps:.2f}", f"{1e3 * a_step * steps:.1f}", f"{kB:.1f}", f"{start}"]
        print(f"| {P:,} | " + " | ".join([*cells, f"{1e3 * latency * start:.2f}", f"{connections}"]) + " |")


def steps_of(P: int) -> int:
    """Return the messages of an update that a process sends or waits for, one after another, where P is large."""
    return math.floor(math.log2(P)) + 2 * (P.bit_count() > 1)


def main(processes: list[int], latency: float, file: str | None) -> None:
    if not leave_network():
        print("No network of its own (Linux, as root): messages of other programs on this host are counted too.\n")
    results = {}
    for P in processes:
        results[P] = measured(P)
        if file is not None:
            Path(file).write_text(json.dumps(results))
    print_measured(results)
    print_order()
    print_projected(results, latency)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--json")
    options = parser.parse_args()
    main([*options.processes], options.latency_us * 1e-6, options.json)
