"""Advice on the batch from the noise scale: in words, in records and the report; it is proposed, never done."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import Callback, Task, Trainer
from engine.callbacks import NoiseScale, Progress
from engine.report.facts import facts
from engine.report.page import page
from engine.report.reading import read
from engine.update.noise_scale import FIELDS, advise
from tests.kit.processes import run
from tests.kit.reference import Watch

EXAMPLE = (
    "noise scale 410 samples (95 %: 350 to 490); effective batch 64: up to 4 times larger would still pay; "
    "K=8 hides the reduction; suggested: N=32 K=4"
)


def test_the_line_of_advice() -> None:
    assert advise((410.0, 350.0, 490.0), 64, 1.0, 32, 1, 8) == (32, 4, EXAMPLE)


@pytest.mark.parametrize(
    ("estimate", "batch", "per_sample", "N", "K", "hiding", "size", "best", "said"),
    [
        ((6400.0, 6000.0, 7000.0), 64, 1.0, 16, 4, None, 16, 32, "up to 64 times larger would still pay"),
        ((6400.0, 6000.0, 7000.0), 64, 1.0, 16, 4, 50, 16, 50, "K=50 hides the reduction"),
        (
            (64.0, 32.0, math.inf),
            64,
            1.0,
            16,
            4,
            1,
            16,
            1,
            "(95 %: 32 to infinity); effective batch 64: larger would hardly",
        ),
        ((8.0, 7.0, 9.0), 64, 1.0, 16, 4, 8, 8, 1, "8 times smaller would need fewer samples"),
        (
            (51200.0, 5e4, 6e4),
            64,
            128.0,
            8,
            4,
            None,
            8,
            2,
            "noise scale 51,200 in weight (95 %: 50,000 to 60,000); effe",
        ),
        (
            (51200.0, 5e4, 6e4),
            64,
            128.0,
            8,
            4,
            None,
            8,
            2,
            "effective batch 64 (8,192 in weight): up to 4 times larger",
        ),
        (
            (math.inf, 640.0, math.inf),
            64,
            1.0,
            16,
            4,
            None,
            16,
            4,
            "noise scale infinity samples (95 %: 640 to infinity)",
        ),
    ],
)
def test_the_suggestion(
    estimate: Any, batch: int, per_sample: float, N: int, K: int, hiding: int | None, size: int, best: int, said: str
) -> None:
    advice = advise(estimate, batch, per_sample, N, K, hiding)
    assert advice is not None
    assert advice[:2] == (size, best)
    assert said in advice.text


@pytest.mark.parametrize("estimate", [(math.nan,) * 3, (0.0, 0.0, math.nan), (math.inf, math.nan, math.nan)])
def test_no_advice_while_it_is_unknown(estimate: Any) -> None:
    assert advise(estimate, 64, 1.0, 16, 4, None) is None


def test_every_n_updates_is_checked() -> None:
    with pytest.raises(ValueError, match=r"NoiseScale.every_n_updates=0: .* at least 1"):
        NoiseScale(0)


class Quadratic(Task):
    """theta H theta / 2 - theta e, with noise e of covariance H: |G|^2 and tr S are known everywhere."""

    H = np.logspace(0, -math.log10(30), 20)
    target = H.sum() / 2 / 50

    def __init__(self, lr: float, seed: int = 0, samples: int = 8192) -> None:
        self.lr = lr
        noise = torch.randn(samples, len(self.H), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.noise = (noise - noise.mean(0)) * torch.from_numpy(self.H).sqrt()

    def configure_model(self) -> nn.Module:
        return nn.Linear(len(self.H), 1, bias=False).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        with torch.no_grad():
            model.weight.fill_(1.0)
        return torch.optim.SGD(model.parameters(), lr=self.lr)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(self.noise)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        weight = getattr(model, "module", model).weight
        return (torch.from_numpy(self.H) * weight**2).sum() / 2 - model(batch[0]).mean()

    @classmethod
    def true_loss(cls, model: nn.Module) -> float:
        return float((torch.from_numpy(cls.H) * model.weight.detach() ** 2).sum() / 2)


class UntilTarget(Callback):
    def on_update_end(self, trainer: Any) -> None:
        if Quadratic.true_loss(trainer.model) <= Quadratic.target:
            trainer.stop()


@cache
def updates_needed(batch: int) -> tuple[int, float]:
    """Return the updates until the expected loss is at the target, and the learning rate that needs fewest. Exact."""
    H, rates = Quadratic.H, np.geomspace(0.005, 1.9, 120)[:, None]
    square = np.ones((len(rates), len(H)))
    for update in range(5000):
        losses = (H * square).sum(1) / 2
        if losses.min() <= Quadratic.target:
            return update, float(rates[losses.argmin(), 0])
        square = (1 - rates * H) ** 2 * square + rates**2 * H / batch
    raise AssertionError("the target is out of reach")


def measured_advice() -> Any:
    noise = NoiseScale(1)
    trainer = Trainer("single", 2, 32, max_epochs=1, callbacks=[noise, UntilTarget()])
    trainer.fit(Quadratic(0.2))
    return noise.advice(trainer), trainer.record


def test_the_advised_batch_needs_a_tenth_more_samples_than_the_best_of_a_grid_at_most() -> None:
    advice, record = measured_advice()
    updates = {(N, K): updates_needed(N * K)[0] for N, K in product((2, 4, 8, 16), repeat=2)}
    samples = {(N, K): N * K * count for (N, K), count in updates.items()}
    advised = advice.N, advice.K
    assert advised in samples
    assert samples[advised] <= 1.1 * min(samples.values())
    assert max(samples.values()) > 1.8 * min(samples.values())  # the grid has something to lose
    assert record["noise_scale_low"] < 130 < record["noise_scale_high"]  # at the target, by arithmetic


@pytest.mark.slow
def test_the_recursion_is_what_runs_do() -> None:
    advice, _ = measured_advice()
    for N, K in ((advice.N, advice.K), (16, 16)):
        updates, lr = updates_needed(N * K)
        losses = []
        for seed in range(40):
            trainer = Trainer("single", N, K, max_updates=updates, seed=seed)
            trainer.fit(Quadratic(lr, seed))
            losses.append(Quadratic.true_loss(trainer.model))
        assert np.mean(losses) == pytest.approx(
            Quadratic.target, abs=4 * np.std(losses) / math.sqrt(40) + 0.05 * Quadratic.target
        )


def fit(folder: str | None = None) -> Any:
    watch, noise = Watch(), NoiseScale(1)
    callbacks = [watch, noise, Progress(0.0, ["noise_scale"])]
    Trainer("auto", 4, 8, max_epochs=3, callbacks=callbacks, run_dir=folder).fit(Quadratic(0.01, samples=512))
    return watch.records, noise.proposal


@pytest.mark.parametrize("P", [1, 2])
def test_K_is_proposed_and_stays(P: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = run(P, fit, str(tmp_path / "run"))
    told = capfd.readouterr().out
    for records, proposal in results:
        assert {record["accumulate_grad_batches"] for record in records} == {8}
        assert proposal == {0: 8, 1: 1}  # the noise scale is 2 samples, the batch 32 and 64
    lines = [line for line in told.splitlines() if line.startswith("noise scale ")]
    assert [line.partition("; proposed: ")[2] for line in lines] == ["GradientAccumulationScheduler({0: 8, 1: 1})", ""]
    assert "  noise_scale " in told  # progress, on request
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    advice = [event["text"] for event in events if event["event"] == "advice"]
    assert len(advice) > 2
    assert advice[-1] == lines[-1]
    whole = read(tmp_path / "run")
    assert facts(whole)["Which batch"] == lines[-1]
    assert whole.updates["noise_scale"][-1] == pytest.approx(results[0][0][-1]["noise_scale"])


def test_the_report_shows_it_beside_the_weight_of_an_update(tmp_path: Path) -> None:
    run(1, fit, str(tmp_path / "run"))
    text = page([read(tmp_path / "run")])
    data = json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    (plot,) = [plot for plot in data["plots"] if plot["name"].startswith("noise_scale")]
    assert plot["beside"] == ["noise_scale_low", "noise_scale_high", "weight"]
    assert {*FIELDS, "weight"} <= data["runs"][0]["series"].keys()
