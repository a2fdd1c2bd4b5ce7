"""Validation metrics that are not means (AUROC, F1, a confusion matrix) see each sample of all processes once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.classification as known
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.text import BLEUScore

from engine import Trainer
from engine.callbacks import EarlyStopping, PlateauLR
from strategies import PipelineStrategy
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Samples
from tests.kit.streams import Stream

VALIDATED = 13


class Spread:
    """A metric of our own: the largest difference of two scores, and how many there were."""

    def reset(self) -> None:
        self.scores: list[float] = []

    def update(self, scores: Tensor) -> None:
        self.scores += scores.flatten().tolist()

    def merge_state(self, other: Spread) -> None:
        self.scores += other.scores

    def compute(self) -> dict[str, float]:
        return {"width": max(self.scores) - min(self.scores), "count": len(self.scores)}


class Classified(Regression):
    """Scores of a model, and whether the target is positive; `own` adds the metric above."""

    def __init__(self, own: bool = True, collection: bool = False) -> None:
        super().__init__(24)
        metrics: Any = {
            "auroc": known.BinaryAUROC(),
            "f1": known.BinaryF1Score(),
            "confusion": known.BinaryConfusionMatrix(),
        }
        self.validation_metrics = MetricCollection(metrics) if collection else metrics
        self.own = own
        if own and not collection:
            self.validation_metrics["spread"] = Spread()

    def validation_data(self) -> Any:
        return Samples(self.x[:VALIDATED], self.y[:VALIDATED])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        scores = model(batch[0])[:, 0].sigmoid()
        for name, metric in self.validation_metrics.items():
            metric.update(*((scores,) if name == "spread" else (scores, (batch[1] > 0)[:, 0].int())))
        self.log("score", scores.mean())


def expected(model: nn.Module, task: Classified) -> dict[str, float]:
    """By hand, on all samples at once, in float64."""
    with torch.no_grad():
        scores = model(task.x[:VALIDATED])[:, 0].sigmoid()
    positive, guess = (task.y[:VALIDATED] > 0)[:, 0], scores > 0.5
    pairs = scores[positive][:, None] - scores[~positive]
    cells = {f"confusion/{t}/{p}": ((positive == t) & (guess == p)).sum().item() for t in (0, 1) for p in (0, 1)}
    right = cells["confusion/1/1"]
    return {
        "score": scores.mean().item(),
        "auroc": (pairs > 0).double().mean().item() + (pairs == 0).double().mean().item() / 2,
        "f1": 2 * right / (2 * right + cells["confusion/0/1"] + cells["confusion/1/0"]),
        **cells,
        "spread/width": (scores.max() - scores.min()).item(),
        "spread/count": VALIDATED,
    }


CASES = [("single", 1), *(("ddp", P) for P in (2, 3, 4)), ("fsdp", 2), ("pipeline", 2)]


@pytest.mark.parametrize(
    ("strategy", "P", "collection"),
    [*((*case, False) for case in CASES), ("ddp", 2, True)],
)
def test_each_sample_counts_once(strategy: str, P: int, collection: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    @on_processes(P)
    def results() -> Any:
        made: Any = PipelineStrategy(micro_batches=2, schedule="GPipe") if strategy == "pipeline" else strategy
        trainer = Trainer(
            made, 2, accumulate_grad_batches=2, max_epochs=2, keep_best="max:auroc", run_dir=str(tmp_path / "run")
        )
        task = Classified(collection=collection)
        trainer.fit(task)
        metrics = dict(trainer.metrics)
        again = trainer.validate(Classified(own=False))
        return metrics, again

    task = Classified()
    model = task.model()
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    right = expected(model, task)
    if collection:
        right = {name: value for name, value in right.items() if "spread" not in name}
    for metrics, again in results:
        assert metrics == pytest.approx(right, rel=1e-6)  # torchmetrics computes in float32
        assert metrics["score"] == pytest.approx(right["score"], rel=1e-12)
        assert again == pytest.approx({n: v for n, v in right.items() if "spread" not in n}, rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    recorded = {name.removeprefix("validation/"): value for name, value in lines[-1].items()}
    assert {name: recorded[name] for name in right} == pytest.approx(right, rel=1e-6)


def test_streams_that_end_early_count_once() -> None:
    class Few(Classified):
        def validation_data(self) -> Any:
            rank = torch.distributed.get_rank()
            rows = [range(8), range(8, VALIDATED), ()][rank]
            return Stream(self, [[row] for row in rows])

        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            super().evaluate(model, (batch["x"], batch["nested"][0]))

    def fit_few() -> Any:
        trainer = Trainer("ddp", 2, max_updates=1)
        trainer.fit(task := Few())
        return trainer.metrics, expected(trainer.model, task)

    for metrics, right in run(3, fit_few):
        assert metrics == pytest.approx(right, rel=1e-6)


def test_they_decide_over_stops_and_learning_rates() -> None:
    @on_processes(2)
    def results() -> Any:
        task = Classified()
        callbacks = [EarlyStopping("auroc", patience=2, mode="max"), PlateauLR("spread/count", "max", patience=0)]
        trainer = Trainer("ddp", 2, max_epochs=9, callbacks=callbacks)
        trainer.fit(task)
        return trainer.update, trainer.optimizer.param_groups[0]["lr"], callbacks[0].best

    first, second = results
    assert first == second
    assert first[1] < 0.1  # the count never improves


class NoMerge:
    """A metric that knows its own samples only."""

    def reset(self) -> None: ...

    def update(self, *_: Tensor) -> None: ...

    def compute(self) -> float:
        return 1.0


class Fails(Spread):
    def compute(self) -> Any:
        raise ZeroDivisionError("no samples")


class With(Classified):
    def __init__(self, **metrics: Any) -> None:
        super().__init__()
        self.validation_metrics = metrics

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        for metric in self.validation_metrics.values():
            metric.update(model(batch[0]))
        return {"loss": self.loss(model, batch)}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"a": NoMerge},
            r"validation_metrics\['a'\] is a NoMerge, which cannot be gathered from 2 processes: expected",
        ),
        ({"bleu": BLEUScore}, r"validation_metrics\['bleu'\] is a BLEUScore, which cannot be gathered.*merge_state"),
        ({"a": lambda: lambda scores: scores}, r"validation_metrics\['a'\] is a function: expected an object with up"),
        ({"a": Fails}, r"validation_metrics\['a'\] failed: ZeroDivisionError: no samples"),
        ({"loss": NoMerge}, "cannot be gathered"),
    ],
)
def test_what_cannot_be_gathered_is_refused_on_all_processes(metrics: Any, message: str) -> None:
    def fit_it() -> None:
        Trainer("ddp", 2, max_updates=1).fit(With(**{name: make() for name, make in metrics.items()}))

    with pytest.raises(ChildError, match=message) as caught:
        run(2, fit_it)
    assert {*caught.value.errors} == {0, 1}
    assert len({text.partition(":")[0] for text in caught.value.errors.values()}) == 1


def test_metrics_that_differ_between_processes_are_refused_before_training() -> None:
    def fit_it() -> None:
        Trainer("ddp", 2, max_updates=1).fit(With(**{f"spread_{torch.distributed.get_rank()}": Spread()}))

    with pytest.raises(
        ChildError, match=r"the names of task.validation_metrics is \['spread_0'\] on process 0"
    ) as caught:
        run(2, fit_it)
    assert {*caught.value.errors} == {0, 1}


def test_one_process_needs_no_merging_and_names_must_differ() -> None:
    trainer = Trainer("single", 2, max_updates=1)
    trainer.fit(With(a=NoMerge()))
    assert trainer.metrics["a"] == 1.0
    with pytest.raises(ValueError, match="each of another name"):
        trainer.fit(With(loss=NoMerge()))


def test_a_curve_is_not_recorded_but_said(caplog: pytest.LogCaptureFixture) -> None:
    class Curve(NoMerge):
        def compute(self) -> Any:
            return torch.zeros(1001)

    trainer = Trainer("single", 2, max_updates=1)
    with caplog.at_level(logging.WARNING, "tally"):
        trainer.fit(With(curve=Curve()))
    assert [*trainer.metrics] == ["loss"]
    assert "curve has more than 1000 numbers, and is not recorded" in caplog.text
