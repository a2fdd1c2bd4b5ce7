"""The noise scale of `digits` and `stdlib_lm` over a run, and whether following its advice pays, against fixed K.

    python tests/benchmarks/stories/noise.py [WORKERS]

A run at K=4 measures each update and proposes a schedule. A second run follows it, others keep K=1, 4 and 16. The
learning rate follows the square root of the effective batch in all of them. "Reached" is the first validation at which
the held-out loss is as low as the best of the run that came least far.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engine import Callback, GradientAccumulationScheduler, Task, Trainer
from engine.callbacks import NoiseScale
from launch.recipes.digits import Digits
from launch.recipes.stdlib_lm import StdlibLM
from tests.benchmarks.run import DOCS, publish
from tests.benchmarks.stories.picture import Panel, draw

SEEDS, MEASURED, FIXED = (0,), 4, (1, 16)


@dataclass(frozen=True)
class Setting:
    """A recipe: its task, N, epochs, the batch of its learning rate, the metric, and validations in micro-batches."""

    make: Callable[[], Task]
    N: int
    epochs: int
    reference: int
    metric: str
    every: int


SETTINGS = {
    "digits": Setting(Digits, 16, 4, 32, "loss", 32),
    "stdlib_lm": Setting(lambda: StdlibLM(width=64, max_bytes=256, functions=320), 4, 3, 16, "nats_per_byte", 32),
}


@dataclass
class Kept(Callback):
    """Keeps the records, and the held-out loss by (updates, samples)."""

    metric: str
    records: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, int, float]] = field(default_factory=list)
    proposal: dict[int, int] = field(default_factory=dict)
    advice: str = ""

    def on_update_end(self, trainer: Trainer) -> None:
        self.records.append(dict(trainer.record))

    def on_validation_end(self, trainer: Trainer) -> None:
        self.held_out.append((trainer.update, trainer.samples, trainer.metrics[self.metric]))

    def reached(self, target: float) -> tuple[int, int]:
        """Return the updates and samples until the held-out loss was at most `target`."""
        return next((update, samples) for update, samples, loss in self.held_out if loss <= target)

    @property
    def best(self) -> float:
        return min(loss for _, _, loss in self.held_out)


def fit(name: str, seed: int, scheduling: dict[int, int], measures: bool = False) -> Kept:
    setting = SETTINGS[name]
    kept, noise = Kept(setting.metric), NoiseScale(1)
    trainer = Trainer(
        *("single", setting.N),
        seed=seed,
        gradient_clip_norm=1.0,
        lr_rule="sqrt",
        lr_reference_batch=setting.reference,
        validate_every_n_updates=max(1, setting.every // max(scheduling.values())),
        callbacks=[kept, GradientAccumulationScheduler(scheduling), *([noise] if measures else [])],
        max_epochs=setting.epochs,
    )
    trainer.fit(setting.make())
    if measures:
        advice = noise.advice(trainer)
        kept.proposal, kept.advice = noise.proposal or {0: MEASURED}, advice.text if advice else "none"
    return kept


def all_runs(workers: int) -> dict[tuple[str, int], dict[str, Kept]]:
    """Return the runs of each recipe and seed by name, the one that measures first."""
    keys = [(name, seed) for name in SETTINGS for seed in SEEDS]
    with ProcessPoolExecutor(workers) as pool:
        measuring = {key: pool.submit(fit, *key, {0: MEASURED}, True) for key in keys}
        fixed = {(*key, K): pool.submit(fit, *key, {0: K}) for key in keys for K in FIXED}
        following = {key: pool.submit(fit, *key, run.result().proposal) for key, run in measuring.items()}
        return {
            key: {
                f"K={MEASURED}, measures": measuring[key].result(),
                f"follows {measuring[key].result().proposal}": following[key].result(),
                **{f"K={K}": fixed[*key, K].result() for K in FIXED},
            }
            for key in keys
        }


def figures(found: dict[tuple[str, int], dict[str, Kept]]) -> str:
    lines = [
        "| recipe | seed | the run | updates until reached | samples until reached | best held-out loss |",
        "| --- | --: | --- | --: | --: | --: |",
    ]
    for (name, seed), runs in found.items():
        target = max(kept.best for kept in runs.values())
        for run, kept in runs.items():
            updates, samples = kept.reached(target)
            lines.append(f"| {name} | {seed} | {run} | {updates:,} | {samples:,} | {kept.best:.4f} |")
    lines += ["", "The advice at the end of the runs that measure:", ""]
    measured = {key: next(iter(runs.values())) for key, runs in found.items()}
    lines += [f"- `{name}`, seed {seed}: {kept.advice}." for (name, seed), kept in measured.items()]
    return "\n".join(lines)


def picture(found: dict[tuple[str, int], dict[str, Kept]]) -> str:
    panels = []
    for name in SETTINGS:
        records = next(iter(found[name, SEEDS[0]].values())).records
        curves = [(2, _curve(records, "noise_scale_low")), (2, _curve(records, "noise_scale_high"))]
        curves = [(0, _curve(records, "noise_scale")), (1, _curve(records, "weight")), *curves]
        values = [value for _, curve in curves for _, value in curve if 0 < value < math.inf]
        low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
        shown = [(colour, [(x, min(max(y, low), high)) for x, y in curve]) for colour, curve in curves]
        panels.append(Panel(f"{name}, by update", shown, low, high, log=True))
    legend = ["noise scale", "weight of an update", "95 % interval"]
    return draw("The noise scale of two recipes over a run, and the weight of their updates", legend, [panels])


def _curve(records: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(record["update"], record[name]) for record in records if not math.isnan(record[name])]


def main() -> None:
    found = all_runs(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    text = figures(found)
    print(text)
    publish("noise_story", text, "noise-scale.md")
    Path(DOCS, "images", "noise-scale.svg").write_text(picture(found))


if __name__ == "__main__":
    main()
