"""Kills and signals at random moments: how each start ended, and whether the run equals the one left alone to the bit.

    python tests/benchmarks/kills.py [--kills 100] [--signals 60] [--seed 0] [--seconds 3600]

A run of two processes with a loader worker each, a checkpoint after each fifth update. Each start is disturbed once: by
SIGKILL to one process or to both, or by SIGTERM, SIGINT or SIGUSR1 to a process, to both or to torchrun; while it
starts, in the middle or at its end. Then it is started again, until it has come to its end. Half of the signals go to
runs under `launch.start`, some of the kills, too; the other starts are forks, without torchrun.

Fails if a status is not one of docs/reference/exit-statuses.md, if a run that was resumed is not exact, if updates that
a status calls saved are lost, or if a process is left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.util
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.utils.data import TensorDataset

from engine import Task
from engine.cli.main import main as command
from tests.kit import ROOT
from tests.kit.hosts import Started, until

UPDATES, EVERY, P = 80, 5, 2
SAVED, LOST = 75, 76
MOMENTS = ("starting", "middle", "end")


class Job(Task):
    def configure_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_data(self) -> TensorDataset:
        x = torch.randn(330, 8, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x.sum(1, keepdim=True) ** 2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(0.004)
        return nn.functional.mse_loss(model(batch[0]), batch[1])


def options(run: Path) -> list[str]:
    values = {
        "micro_batch_size": 4,
        "accumulate_grad_batches": 2,
        "max_updates": UPDATES,
        "save_every_n_updates": EVERY,
        "num_workers": 1,
        "progress": "false",
        "run_dir": run,
    }
    return ["--task=kills.Job", *(f"--trainer.{name}={value}" for name, value in values.items())]


class Forks:
    """Two processes of a run, each with its children in a group of its own. Another dies: the rest get SIGTERM."""

    def __init__(self, run: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": P, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._log = Path(f"{run}.log")
        self.workers, self.statuses = [], dict[int, int]()
        for rank in range(P):
            if (pid := os.fork()) == 0:
                self._become(run, {name: str(value) for name, value in {**place, "RANK": rank}.items()})
            self.workers.append(pid)

    def _become(self, run: Path, place: dict[str, str]) -> None:
        os.setpgid(0, 0)
        os.environ.update(place, LOCAL_RANK=place["RANK"])
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        status = 1
        try:
            status = command(options(run))
        except BaseException:
            traceback.print_exc()
        multiprocessing.util._exit_function()  # as an interpreter does that ends; the rest is the parent's
        sys.stderr.flush()
        os._exit(status)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ended(self) -> bool:
        """Whether all have ended."""
        for pid in set(self.workers) - set(self.statuses):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.statuses[pid] = os.waitstatus_to_exitcode(status)
                for other in set(self.workers) - set(self.statuses) if self.statuses[pid] else ():
                    os.kill(other, signal.SIGTERM)
        return len(self.statuses) == P

    def finish(self, disturbed: Sequence[int], number: int) -> tuple[list[int], int]:
        """Wait for all; return their statuses, less those of the killed, and how many processes are left."""
        until(self.ended, 90, "the end of all processes")
        killed = disturbed if number == signal.SIGKILL else ()
        left = [pid for pid in self.workers if not _is_gone(pid)]
        for pid in left:
            os.killpg(pid, signal.SIGKILL)
        return [status for pid, status in self.statuses.items() if not (pid in killed and status == -number)], len(left)


def _is_gone(group: int) -> bool:
    """Whether a group of processes ends within some seconds: a loader's worker looks for its parent every five."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        with suppress(ChildProcessError):
            os.waitpid(-group, os.WNOHANG)
        time.sleep(0.05)
    return False


class Torchrun:
    """The same under launch.start."""

    def __init__(self, run: Path) -> None:
        launch = [sys.executable, "-m", "launch.start", "--standalone", f"--nproc_per_node={P}"]
        here = Path(__file__).resolve().parent
        paths = {"PYTHONPATH": f"{ROOT}:{here}"}
        self._started = Started([*launch, str(ROOT / "engine" / "run.py"), *options(run)], run.parent, **paths)

    @property
    def workers(self) -> list[int]:
        return [*self._started.workers.values()][:P]

    @property
    def agent(self) -> int:
        return self._started.process.pid

    def output(self) -> str:
        return self._started.output

    def ended(self) -> bool:
        return self._started.process.poll() is not None

    def finish(self, disturbed: Sequence[int], number: int) -> tuple[list[int], int]:
        status = self._started.wait(90)
        end = time.monotonic() + 15
        while (left := len(list(self._started._alive()))) and time.monotonic() < end:
            time.sleep(0.05)
        self._started.__exit__()
        killed = number == signal.SIGKILL and self.agent in disturbed
        return [] if killed else [128 - status if status < 0 else status], left


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, less what the clock says."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: v for name, v in json.loads(line).items() if name != "samples_per_second"} for line in lines]


def events(run: Path) -> list[str]:
    path = run / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


def begun(run: Path) -> int:
    """How often the run has started to train."""
    return sum(event in ("start", "resume") for event in events(run))


def disturb(start: Forks | Torchrun, run: Path, number: int, moment: str, draw: random.Random) -> list[int]:
    """Send the signal at a random point of a moment; return whom it was sent to."""
    starts = begun(run)
    if moment == "starting":
        time.sleep(draw.uniform(0, 0.5 if isinstance(start, Forks) else 6))
    else:
        until(lambda: start.ended() or begun(run) > starts, 90, "a start")
        goal = UPDATES if moment == "end" else draw.randint(min(len(records(run)) + 1, UPDATES), UPDATES)
        until(lambda: start.ended() or len(records(run)) >= goal, 90, f"update {goal}")
        time.sleep(draw.uniform(0, 0.3 if moment == "end" else 0.02))
    workers = start.workers
    choices = [workers[rank : rank + 1] for rank in range(P)] + [workers]
    if isinstance(start, Torchrun) and number != signal.SIGKILL:
        choices += [[start.agent]] * 3
    targets = draw.choice(choices)
    if not start.ended():
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    return targets


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, default in {"kills": 100, "signals": 60, "seed": 0, "seconds": 3600}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    draw, began = random.Random(given.seed), time.monotonic()
    numbers = [signal.SIGKILL] * given.kills
    numbers += [(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[n % 3] for n in range(given.signals)]
    plan = [
        (number, draw.choice(MOMENTS), draw.random() < (0.1 if number == signal.SIGKILL else 0.5)) for number in numbers
    ]
    draw.shuffle(plan)
    told: Counter[tuple[str, str, str, str]] = Counter()
    faults, runs, done = [], 0, 0
    with tempfile.TemporaryDirectory() as parent:
        alone = Path(parent, "alone")
        assert Forks(alone).finish((), 0) == ([0] * P, 0), Path(f"{alone}.log").read_text()
        whole, weights, run = records(alone), (alone / "model.safetensors").read_bytes(), Path(parent, "0")
        while plan and time.monotonic() - began < given.seconds:
            number, moment, is_torchrun = plan.pop()
            start = (Torchrun if is_torchrun else Forks)(run)
            targets = disturb(start, run, number, moment, draw)
            statuses, left = start.finish(targets, number)
            done += 1
            allowed = {0, SAVED, LOST} if number != signal.SIGUSR1 else {0}
            name = signal.Signals(number).name
            where = "torchrun" if is_torchrun else "forks"
            told[name, moment, where, " ".join(map(str, sorted(set(statuses)))) or "-"] += 1
            case = f"{name}, {moment}, {where}, run {run.name}: statuses {statuses}"
            is_odd = number != signal.SIGKILL and LOST in statuses and moment != "starting"
            if is_odd or not set(statuses) <= allowed:
                faults.append(f"{case}: not documented for this. {start.output()[-900:]}")
            if left:
                faults.append(f"{case}: {left} processes left")
            if SAVED in statuses and moment != "starting" and number != signal.SIGKILL:
                saved = int((run / "checkpoints" / "latest").read_text().split("-")[1])
                if saved != len(records(run)) or events(run)[-1] != "interrupt":
                    faults.append(f"{case}: {len(records(run))} updates on record, {saved} saved")
            if (run / "summary.json").exists():
                runs += 1
                if records(run) != whole or (run / "model.safetensors").read_bytes() != weights:
                    faults.append(f"{case}: not the run left alone")
                run = Path(parent, str(runs))
            print(f"{done}: {case}", file=sys.stderr, flush=True)
        until_end = Forks(run)
        assert until_end.finish((), 0) == ([0] * P, 0)
        if records(run) != whole or (run / "model.safetensors").read_bytes() != weights:
            faults.append("the last run is not the run left alone")
    print("| signal | moment | started by | statuses | times |\n| --- | --- | --- | --- | --: |")
    for row, times in sorted(told.items()):
        print(f"| {' | '.join(row)} | {times} |")
    print(f"\n{done} disturbed starts of {runs + 1} runs; {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.modules["kills"] = sys.modules["__main__"]
    sys.exit(main())
