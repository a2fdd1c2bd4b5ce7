"""The recipe `stdlib_lm` with two losses, nothing else differs: `Loss(sum, bytes)`, and the mean of each micro-batch.

    python tests/benchmarks/stories/tokens.py

A small setting: two processes, N=2, K=8, three epochs of 576 functions, cut to 256 bytes; in the recipe's own order, in
which the micro-batches of a window are of like length, and shuffled. The held-out mean is over bytes for both losses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from torch import Tensor, nn

from engine import Callback, Loss, Trainer
from launch.recipes.stdlib_lm import StdlibLM
from launch.recipes.stdlib_lm.functions import train_and_held_out
from tests.benchmarks.stories.picture import Panel, draw, tell
from tests.kit.processes import run

P, N, K, EPOCHS, SEEDS, EVERY = 2, 2, 8, 3, (0, 1), 9
ORDERS = ("bucketed", "shuffled")
OPTIONS = {"width": 64, "max_bytes": 256, "functions": 640}

Curve = list[tuple[int, float]]
"""Updates, and what was held out at each: nats per byte."""


class MeanOfMeans(StdlibLM):
    """The recipe with the mean over each micro-batch's bytes: every micro-batch counts for its samples."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:  # type: ignore[override]
        loss = super().loss(model, batch)
        return Tensor(loss.sum / loss.weight)

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss]:
        return {"nats_per_byte": super().loss(model, batch)}


TASKS = {"Loss(sum, bytes)": StdlibLM, "bare mean": MeanOfMeans}


class Watch(Callback):
    """Keeps the records, and the held-out means by update."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.held_out: Curve = []

    def on_update_end(self, trainer: Trainer) -> None:
        self.records.append(dict(trainer.record))

    def on_validation_end(self, trainer: Trainer) -> None:
        self.held_out.append((trainer.update, trainer.metrics["nats_per_byte"]))


def fit(name: str, seed: int, options: Mapping[str, Any], epochs: int = EPOCHS) -> Watch:
    watch = Watch()
    trainer = Trainer(
        *("ddp", N, K),
        max_epochs=epochs,
        seed=seed,
        gradient_clip_norm=1.0,
        validate_every_n_epochs=None,
        validate_every_n_updates=EVERY,
        callbacks=watch,
    )
    trainer.fit(TASKS[name](**options))
    return watch


Found = dict[tuple[str, int], tuple[Curve, Curve]]
"""By order and seed: the held-out means with each of the two losses."""


def apart(curves: tuple[Curve, Curve]) -> Curve:
    """Return by how much the second is above the first."""
    return [(update, b - a) for (update, a), (_, b) in zip(*curves, strict=True)]


def figures(found: Found) -> str:
    """Return the held-out means at the end, and how far the curves were apart."""
    lines = [
        "Held-out nats per byte after the last update; what the bare mean has more of, then and at most in the run.",
        "",
        f"| order | seed | {' | '.join(TASKS)} | difference | at most |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for (order, seed), curves in found.items():
        difference = [value for _, value in apart(curves)]
        ends = " | ".join(f"{curve[-1][1]:.4f}" for curve in curves)
        lines.append(f"| {order} | {seed} | {ends} | {difference[-1]:+.4f} | {max(difference, key=abs):+.4f} |")
    return "\n".join(lines)


def picture(found: Found) -> str:
    """Return, for each order, the curves of the first seed, and the difference for all seeds."""
    ends = [value for curves in found.values() for curve in curves for _, value in curve]
    extent = 1.1 * max(abs(value) for curves in found.values() for _, value in apart(curves))
    rows = []
    for order in ORDERS:
        curves = list(enumerate(found[order, SEEDS[0]]))
        differences = [(1, apart(found[order, seed])) for seed in SEEDS]
        rows.append(
            [
                Panel(f"held-out nats per byte, {order}", curves, 0.95 * min(ends), 1.02 * max(ends)),
                Panel("the bare mean's, less the other; each seed", differences, -extent, extent),
            ]
        )
    return draw("Held-out loss with token weights, and with a mean of means", list(TASKS), rows)


def main() -> None:
    train_and_held_out(OPTIONS["functions"])  # read once: the processes inherit it
    found: Found = {}
    for order, seed in product(ORDERS, SEEDS):
        print(f"{order}, seed {seed} ...", file=sys.stderr)
        options = {**OPTIONS, "batches": order}
        one, other = (run(P, fit, name, seed, options, seconds=600)[0].held_out for name in TASKS)
        found[order, seed] = one, other
    tell("tokens", figures(found), picture(found))


if __name__ == "__main__":
    main()
