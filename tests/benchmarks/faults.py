"""How long a fault takes: until the others of a process that is lost have ended, and until a restarted run goes on.

    python tests/benchmarks/faults.py [--repetitions 5]

Processes train a small model on the CPU, with a checkpoint after every fifth update. After the twentieth:

- one is killed with SIGKILL, or stopped with SIGSTOP, and the clock runs until the last of the others has ended, each
  with the error that names a lost contact. They are forked, and no torchrun is there that could end them;
- one is killed under `torchrun --max-restarts=1`, and the clock runs until all processes are new, and until each of
  them, which imports torch, meets the others and reads the checkpoint, has made an update.

The kinds of fault take turns, and medians are told, with the least and the most. Seconds depend on the machine, and on
what else it does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kit.hosts import TORCHRUN, Started, until

PROCESSES = (2, 4)
AFTER, EVERY = 20, 5  # updates
TIMEOUT = 5.0  # seconds
PATIENCE = 200.0  # seconds until this script gives up

FAULTS = {
    "the last process is killed": "until the others have ended",
    "process 0 is killed": "until the others have ended",
    f"the last process stands still, `timeout_seconds={TIMEOUT:.0f}`": "until the others have ended",
    "a process is killed under `torchrun --max-restarts=1`": "until all processes are new",
    "the same": "until each has made an update",
}
KILLED_LAST, KILLED_FIRST, STOPPED, RENEWED, RESTARTED = FAULTS


def work(folder: Path) -> None:
    """Train, and write when this process began and when it made which update."""
    with (folder / f"trace-{os.environ['RANK']}").open("a", buffering=1) as trace:
        trace.write(f"0 {time.monotonic()}\n")
        import torch

        from engine import Callback, Task, Trainer
        from strategies import DDPStrategy

        class Job(Task):
            def configure_model(self) -> torch.nn.Module:
                return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))

            def configure_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
                return torch.optim.AdamW(model.parameters())

            def train_data(self) -> list[torch.Tensor]:
                return [torch.ones(64)] * 1000

            def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
                time.sleep(0.01)
                return torch.nn.functional.mse_loss(model(batch), batch)

        class Trace(Callback):
            def on_update_end(self, trainer: Any) -> None:
                trace.write(f"{trainer.update} {time.monotonic()}\n")

        settings: Any = {"run_dir": str(folder / "run"), "save_every_n_updates": EVERY, "max_updates": 100_000}
        strategy = DDPStrategy(timeout_seconds=TIMEOUT if folder.name == "stop" else PATIENCE, device="cpu")
        Trainer(strategy, 4, 4, callbacks=Trace(), **settings).fit(Job())


def traced(folder: Path, rank: int) -> list[list[tuple[int, float]]]:
    """What a process wrote, by start: its first line, at 0, and each update, with the time."""
    path = folder / f"trace-{rank}"
    starts: list[list[tuple[int, float]]] = []
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        update, at = line.split()
        if update == "0":
            starts.append([])
        starts[-1].append((int(update), float(at)))
    return starts


def wait_for(folder: Path, start: int, update: int, P: int) -> list[float]:
    """Return when the n-th starts of all processes made their first update from `update` on."""

    def found() -> list[float]:
        starts = [traced(folder, rank) for rank in range(P)]
        firsts = [
            next((at for made, at in own[start] if made >= update), None) if start < len(own) else None
            for own in starts
        ]
        return [] if None in firsts else [at for at in firsts if at is not None]

    return until(found, PATIENCE, f"update {update} in start {start}")


def lost(folder: Path, P: int, rank: int, how: signal.Signals) -> float:
    """Return the seconds from a signal to one of P processes until the others have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=member, args=(folder, r, P, port), daemon=True) for r in range(P)]
    try:
        for process in processes:
            process.start()
        wait_for(folder, 0, AFTER, P)
        began = time.monotonic()
        os.kill(processes[rank].pid or 0, how)
        others = [r for r in range(P) if r != rank]
        for r in others:
            processes[r].join(PATIENCE)
        seconds = time.monotonic() - began
        errors = [(folder / f"error-{r}").read_text() for r in others]
        assert all("lost contact with another process" in error for error in errors), errors
    finally:
        for process in processes:
            process.kill()
            process.join()
    return seconds


def member(folder: Path, rank: int, P: int, port: int) -> None:
    """Be one of P processes, and leave the error that ends it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": P, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        work(folder)
    except RuntimeError as error:
        (folder / f"error-{rank}").write_text(str(error))
    os._exit(1)


def restarted(folder: Path, P: int) -> tuple[float, float]:
    """Return the seconds from a kill until all processes are new, and until the first update that follows."""
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={P}", "--max-restarts=1", __file__, f"--folder={folder}"]
    with Started(command, folder) as torchrun:
        wait_for(folder, 0, AFTER, P)
        worker = torchrun.workers[P - 1]
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        updated = wait_for(folder, 1, 1, P)
        renewed = [traced(folder, rank)[1][0][1] for rank in range(P)]
    return max(renewed) - began, max(updated) - began


def measure(P: int) -> dict[str, float]:
    """Let each kind of fault happen once to P processes."""
    seconds = {}
    with tempfile.TemporaryDirectory() as parent:
        for name, rank, how, folder in (
            (KILLED_LAST, P - 1, signal.SIGKILL, "kill"),
            (KILLED_FIRST, 0, signal.SIGKILL, "kill-0"),
            (STOPPED, P - 1, signal.SIGSTOP, "stop"),
        ):
            Path(parent, folder).mkdir()
            seconds[name] = lost(Path(parent, folder), P, rank, how)
        Path(parent, "restart").mkdir()
        seconds[RENEWED], seconds[RESTARTED] = restarted(Path(parent, "restart"), P)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        work(options.folder)
        return
    import torch

    import engine  # noqa: F401 - once here, not in each process

    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(options.repetitions):
        for P in PROCESSES:
            for name, seconds in measure(P).items():
                found[name, P].append(seconds)
    print(f"Seconds: medians of {options.repetitions} interleaved repetitions, and the least to the most.")
    print(f"Before it began, {os.cpu_count()} processors had a load of {load:.1f}.\n")
    print("| what happens | measured | " + " | ".join(f"P={P}" for P in PROCESSES) + " |")
    print("| --- | --- |" + " --: |" * len(PROCESSES))
    for name, what in FAULTS.items():
        cells = [
            f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in (found[name, P] for P in PROCESSES)
        ]
        print(f"| {name} | {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
