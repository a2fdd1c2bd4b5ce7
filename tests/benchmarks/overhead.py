"""What one micro-batch costs beside the user's forward and backward: Tally against the loop that everybody writes.

    python tests/benchmarks/overhead.py [--calls-only]

The model is so small (Linear(32, 32), 8 samples) that everything around it shows. Each contender trains on the same
ready micro-batches in one process and one thread, and is measured over the same ones of them, at window boundaries
after a warm-up, so that no start-up is counted:

- calls: of Python and of C functions, as `sys.setprofile` sees them;
- instructions: as callgrind counts them. Unlike seconds they hardly differ from run to run, or on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from engine import Task, Trainer

WINDOWS = (1, 8)
"""The K that are measured. Each divides the three numbers below, so that windows begin and end with them."""
WARM_UP, MEASURED, REST = 24, 240, 16

MicroBatches = list[tuple[Tensor, Tensor]]
Contender = Callable[[Iterable[tuple[Tensor, Tensor]], int], nn.Module]
loss_fn = nn.functional.mse_loss


def nothing() -> None:
    pass


class Feed:
    """Ready micro-batches; it calls `start` before the measured ones are read, and `stop` after.

    It has `__iter__` alone: with `__getitem__` it would be a dataset of samples. Chaining lists adds no Python call.
    """

    def __init__(self, start: Callable[[], None] = nothing, stop: Callable[[], None] = nothing) -> None:
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = micro_batches()
        end = WARM_UP + MEASURED
        return chain(data[:WARM_UP], self._at(self._start), data[WARM_UP:end], self._at(self._stop), data[end:])

    @staticmethod
    def _at(event: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
        event()
        yield from ()


def micro_batches() -> MicroBatches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 32, generator=generator), torch.randn(8, 32, generator=generator))
        for _ in range(WARM_UP + MEASURED + REST)
    ]


# The contenders: each trains on the micro-batches with windows of K, and returns the model


def configured() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def textbook(data: Iterable[tuple[Tensor, Tensor]], K: int) -> nn.Module:
    model, optimizer = configured()
    for i, (x, y) in enumerate(data, start=1):
        loss = loss_fn(model(x), y)
        (loss / K).backward()
        if i % K == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def hand_tuned(data: Iterable[tuple[Tensor, Tensor]], K: int) -> nn.Module:
    model, optimizer = configured()
    scale = torch.tensor(1 / K)
    for i, (x, y) in enumerate(data, start=1):
        loss_fn(model(x), y).backward(gradient=scale)
        if i % K == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


class LinearTask(Task):
    def __init__(self, data: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._data = data

    def configure_model(self) -> nn.Module:
        return nn.Linear(32, 32)

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def train_data(self) -> Iterable[tuple[Tensor, Tensor]]:
        return self._data

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return loss_fn(model(x), y)


def tally(data: Iterable[tuple[Tensor, Tensor]], K: int) -> nn.Module:
    """Everything off: what the textbook loop does, no more."""
    updates = (WARM_UP + MEASURED + REST) // K
    trainer = Trainer("single", 8, accumulate_grad_batches=K, max_updates=updates, skip_nonfinite_updates=False)
    trainer.fit(LinearTask(data))
    return trainer.model


def tally_as_shipped(data: Iterable[tuple[Tensor, Tensor]], K: int) -> nn.Module:
    """A run's folder with losses and gradient norms, progress, and a look at each gradient norm."""
    updates = (WARM_UP + MEASURED + REST) // K
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
    ):
        trainer = Trainer(
            "single", 8, accumulate_grad_batches=K, max_updates=updates, run_dir=f"{folder}/run", progress=True
        )
        trainer.fit(LinearTask(data))
    return trainer.model


CONTENDERS: dict[str, Contender] = {
    "textbook": textbook,
    "hand-tuned": hand_tuned,
    "Tally, everything off": tally,
    "Tally as shipped": tally_as_shipped,
}
RUNS = [(name, K) for K in WINDOWS for name in CONTENDERS]


# The measurements


def check_that_all_agree() -> None:
    """Raise AssertionError where a contender ends with other parameters than the textbook: it would be another run."""
    for name, K in RUNS:
        expected, actual = textbook(Feed(), K), CONTENDERS[name](Feed(), K)
        for a, b in zip(expected.parameters(), actual.parameters(), strict=True):
            difference = (a - b).abs().max().item()
            assert difference <= 1e-6, f"{name}, K={K}: a parameter differs from the textbook's by {difference}"


def calls(name: str, K: int) -> float:
    """Count calls per micro-batch."""
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    CONTENDERS[name](Feed(lambda: sys.setprofile(see), lambda: sys.setprofile(None)), K)
    return count / MEASURED


def all_instructions() -> list[float] | None:
    """Count instructions per micro-batch for each of RUNS, in one valgrind process; None where there is no valgrind."""
    if shutil.which("valgrind") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*valgrind, sys.executable, __file__, "--under-valgrind"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"valgrind ended with {done.returncode}:\n{done.stderr[-3000:]}")
        # out.1 is the first run, and so on; `out` is what came after the last
        dumps = [Path(folder, f"out.{number}").read_text() for number in range(1, len(RUNS) + 1)]
    return [sum(int(total) for total in re.findall(r"^totals: (\d+)", dump, re.M)) / MEASURED for dump in dumps]


def run_under_valgrind() -> None:
    """Make all runs, each leaving a dump of what was counted in its measured part."""

    def start() -> None:
        gc.collect()
        gc.freeze()  # or a full collection, over all that imports made, would be charged to whom it happens to meet
        torch._C._valgrind_toggle()

    for name, K in RUNS:
        CONTENDERS[name](Feed(start, torch._C._valgrind_toggle_and_dump_stats), K)


def print_table(called: list[float], counted: list[float] | None) -> None:
    print(f"Per micro-batch, over {MEASURED} of them; in brackets: over the textbook loop's.\n")
    print("| contender | K | calls | instructions |\n| --- | --: | --: | --: |")
    for i, (name, K) in enumerate(RUNS):
        base = RUNS.index(("textbook", K))
        in_calls = f"{called[i]:.1f} ({called[i] / called[base]:.2f})"
        in_instructions = f"{counted[i]:,.0f} ({counted[i] / counted[base]:.3f})" if counted else "not counted"
        print(f"| {name} | {K} | {in_calls} | {in_instructions} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls-only", action="store_true", help="do not run valgrind (two minutes)")
    parser.add_argument("--under-valgrind", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.under_valgrind:
        run_under_valgrind()
    else:
        check_that_all_agree()
        counted = None if options.calls_only else all_instructions()
        if counted is None and not options.calls_only:
            print("valgrind is not installed: calls only.\n")
        print_table([calls(name, K) for name, K in RUNS], counted)


if __name__ == "__main__":
    main()
