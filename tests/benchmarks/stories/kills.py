"""A run that is killed five times and started again each time, beside the run that is left alone.

    python tests/benchmarks/stories/kills.py

The recipe `digits` under torchrun, N=16, K=2, a checkpoint after each 20th update. Each kill is a `kill -9` at a random
moment, of one process, or of all with torchrun itself, as where a host is lost. Then the same command is given again.
The second run changes the number of processes each time; its effective batch stays.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import Callback, Trainer
from launch.recipes.digits import Digits
from tests.benchmarks.stories.picture import Panel, draw, tell
from tests.kit.hosts import TORCHRUN, Started, until

N, K, EPOCHS, EVERY = 16, 2, 8, 20
SAMPLES, UPDATES = 1437, EPOCHS * 23
SAME, OTHERS = (2,) * 6, (2, 4, 1, 3, 1, 2)
"""Processes of each start."""


class NumberedDigits(Digits):
    """The recipe; keeps the numbers of the samples that it was given since the last update."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def train_data(self) -> TensorDataset:
        images, digits = super().train_data().tensors
        return TensorDataset(images, digits, torch.arange(len(digits)))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, digits, numbers = batch
        self.seen += numbers.tolist()
        return super().loss(model, (images, digits))


class Witness(Callback):
    """Writes down, on each process, the samples of each update that was made, and by which start of the run."""

    def __init__(self, start: int) -> None:
        self.start = start

    def on_update_end(self, trainer: Trainer) -> None:
        assert isinstance(trainer.task, NumberedDigits)
        line = {"start": self.start, "update": trainer.update, "epoch": trainer.epoch, "seen": trainer.task.seen}
        with Path(f"seen-{self.start}-{trainer.strategy.rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        trainer.task.seen.clear()


def train(start: int, updates: int) -> None:
    """What each process does, at each start."""
    trainer = Trainer(
        *("ddp", N, K),
        max_epochs=EPOCHS,
        max_updates=updates,
        callbacks=Witness(start),
        gradient_clip_norm=1.0,
        run_dir="run",
        save_every_n_updates=EVERY,
    )
    trainer.fit(NumberedDigits())


@dataclass(frozen=True)
class Outcome:
    """What a run has left in its folder."""

    folder: Path
    kills: Sequence[tuple[str, int, int]]
    """Of each what was killed, the last update that was made, and the one that the next start resumed from."""

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if "loss" in record]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less what the clock says."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [{name: v for name, v in json.loads(line).items() if name != "samples_per_second"} for line in lines]

    @property
    def weights(self) -> bytes:
        return (self.folder / "run" / "model.safetensors").read_bytes()

    @property
    def parameters(self) -> Tensor:
        tensors = load_file(self.folder / "run" / "model.safetensors")
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    def times_seen(self) -> list[Counter[int]]:
        """Return, for each epoch, how often each sample is behind the final parameters."""
        return times_seen(witnessed(self.folder))


def witnessed(folder: Path, files: str = "seen-*") -> list[dict[str, Any]]:
    """Return the complete lines; a killed process may have left half of its last one."""
    texts = [file.read_text() for file in folder.glob(files)]
    return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]


def times_seen(lines: Sequence[dict[str, Any]]) -> list[Counter[int]]:
    """Count the samples of each epoch: of an update that was made again, the last start's count."""
    last: dict[int, int] = {}
    for line in lines:
        last[line["update"]] = max(line["start"], last.get(line["update"], 0))
    counts: dict[int, Counter[int]] = {}
    for line in lines:
        if line["start"] == last[line["update"]]:
            counts.setdefault(line["epoch"], Counter()).update(line["seen"])
    return [counts[epoch] for epoch in sorted(counts)]


def run(folder: Path, processes: Sequence[int], updates: int = UPDATES) -> Outcome:
    """Start the run on so many processes each time; kill it each time but the last."""
    folder.mkdir()
    draw, kills = random.Random(0), []
    for start, P in enumerate(processes):
        command = [*TORCHRUN, "--standalone", f"--nproc_per_node={P}", __file__, str(start), str(updates)]
        with Started(command, folder) as torchrun:
            if start == len(processes) - 1:
                assert torchrun.wait(300) == 0, torchrun.output
                break
            workers = torchrun.new_workers(P)
            goal = round(updates * (start + draw.uniform(0.7, 1.3)) / len(processes))
            until(lambda: _made(folder, start, torchrun) >= goal, 120, f"update {goal}")  # noqa: B023
            time.sleep(draw.uniform(0, 0.02))
            rank = draw.randrange(P)
            targets = {rank: workers[rank]} if start % 2 == 0 else {-1: torchrun.process.pid, **workers}
            for target in targets.values():
                with suppress(ProcessLookupError):  # torchrun's processes end with it
                    os.kill(target, signal.SIGKILL)
            assert torchrun.wait(60) != 0, "it had ended before it was killed"
        kills.append((f"process {rank} of {P}" if start % 2 == 0 else f"all {P} and torchrun", start))
    lines = witnessed(folder)
    made = {start: [line["update"] for line in lines if line["start"] == start] for start in range(len(processes))}
    return Outcome(folder, [(what, max(made[start]), min(made[start + 1]) - 1) for what, start in kills])


def _made(folder: Path, start: int, torchrun: Started) -> int:
    """Return the last update that process 0 has made in this start."""
    assert torchrun.process.poll() is None, torchrun.output
    return max((line["update"] for line in witnessed(folder, f"seen-{start}-0")), default=0)


def distance(alone: Outcome, killed: Outcome) -> tuple[list[float], float]:
    """Return the differences of the loss at each update, and the largest of the parameters."""
    losses = [abs(a - b) for a, b in zip(alone.losses, killed.losses, strict=True)]
    return losses, (alone.parameters - killed.parameters).abs().max().item()


def figures(alone: Outcome, outcomes: dict[str, Outcome]) -> str:
    """Return when each run was killed, and how far it is from the one left alone."""
    lines = ["| the run | killed after updates | loss | parameters | metrics.jsonl | weights, as bytes | samples |"]
    lines += ["| --- | --- | --: | --: | --- | --- | --- |"]
    for name, outcome in outcomes.items():
        losses, end = distance(alone, outcome)
        records, weights = (
            "the same" if same else "not the same"
            for same in (outcome.records == alone.records, outcome.weights == alone.weights)
        )
        counts = outcome.times_seen()
        once = sum(count == 1 for epoch in counts for count in epoch.values())
        after = ", ".join(str(update) for _, update, _ in outcome.kills)
        lines.append(
            f"| {name} | {after} | {max(losses):.1e} | {end:.1e} | {records} | {weights} "
            f"| {once:,} of {len(counts) * SAMPLES:,} once in their epoch |"
        )
    return "\n".join(lines)


def picture(alone: Outcome, outcomes: dict[str, Outcome]) -> str:
    """Return the curves, with what was made again in bands, and below them the differences."""
    high = 1.02 * max(alone.losses)
    rows: tuple[list[Panel], list[Panel]] = ([], [])
    for colour, (name, outcome) in enumerate(outcomes.items(), start=1):
        bands = [(resumed, update) for _, update, resumed in outcome.kills]
        curves = [(0, list(enumerate(alone.losses, 1))), (colour, list(enumerate(outcome.losses, 1)))]
        rows[0].append(Panel(f"loss, {name}", curves, 0, high, bands=bands))
        apart = [(colour, list(enumerate(distance(alone, outcome)[0], 1)))]
        notes = [(0.35, 1e-11, "no difference: 0 is at the bottom")] if not any(v for _, v in apart[0][1]) else ()
        rows[1].append(Panel("difference of the loss", apart, 1e-12, 10, log=True, bands=bands, notes=notes))
    legend = ["left alone", *(f"killed five times, {name}" for name in outcomes)]
    return draw("The loss of a run that is killed five times, and of the run left alone", legend, rows, "made again")


def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        alone = run(Path(parent, "alone"), SAME[:1])
        outcomes = {
            "P = 2": run(Path(parent, "same"), SAME),
            f"P = {', '.join(map(str, OTHERS))}": run(Path(parent, "others"), OTHERS),
        }
        tell("kills", figures(alone, outcomes), picture(alone, outcomes))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train(int(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
