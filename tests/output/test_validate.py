"""`Trainer.validate`: the figures of the model just trained, or of the weights that were named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import Callback, Trainer
from engine.callbacks import EMA, Progress
from tests.kit.processes import run
from tests.kit.reference import Regression, Samples


class Validated(Regression):
    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])


class Elsewhere(Validated):
    """The same model on other data."""

    def validation_data(self) -> Any:
        return Samples(self.x[7:], self.y[7:])


def trainer(strategy: str, **options: Any) -> Trainer:
    return Trainer(strategy, **{"micro_batch_size": 2, "accumulate_grad_batches": 4, "max_epochs": 2, **options})


def fit_and_validate(strategy: str, run_dir: str, averages: bool) -> Any:
    callbacks = [EMA(0.5)] if averages else []
    options = {"run_dir": run_dir, "callbacks": callbacks}
    fitted = trainer(strategy, **options)
    fitted.fit(Validated(20))
    trained = dict(fitted.metrics)
    again = [fitted.validate(task) for task in (fitted.task, Validated(20))]
    elsewhere = fitted.validate(Elsewhere(20))
    options["callbacks"] = [EMA(0.5)] if averages else []
    found = trainer(strategy, **options)
    weights = Path(run_dir) / ("model-ema.safetensors" if averages else "model.safetensors")
    named = [
        *(found.validate(Validated(20)) for _ in range(2)),
        trainer(strategy, resume=run_dir, callbacks=options["callbacks"]).validate(Validated(20)),
        trainer(strategy, weights=str(weights)).validate(Validated(20)),
    ]
    return trained, again, named, elsewhere, trainer(strategy).validate(Validated(20))


CASES = [("single", 1), ("ddp", 2), ("fsdp", 2), ("pipeline", 2)]


@pytest.mark.parametrize(("strategy", "P", "averages"), [*((*case, False) for case in CASES), ("ddp", 2, True)])
def test_it_is_the_trained_model_or_the_one_that_was_named(
    strategy: str, P: int, averages: bool, tmp_path: Path
) -> None:
    for trained, again, named, elsewhere, fresh in run(P, fit_and_validate, strategy, str(tmp_path / "run"), averages):
        for means in (*again, *named):
            assert means == pytest.approx(trained, rel=1e-12)
        assert elsewhere["loss"] != pytest.approx(trained["loss"], rel=1e-3)
        assert fresh["loss"] > 1.1 * trained["loss"]


def test_it_validates_after_a_run_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = trainer("single", callbacks=Progress())
    fitted.fit(Validated(20))
    assert fitted.validate(Validated(20)) == fitted.metrics
    assert "done: " in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    options = {"run_dir": str(tmp_path / "mistyped")}
    with pytest.raises(ValueError, match=r"mistyped'?: expected a run with a checkpoint\. Use weights=FILE, or resum"):
        trainer("single", **options).validate(Validated(20))
    new = trainer("single", resume="never", **options).validate(Validated(20))
    assert new == trainer("single").validate(Validated(20))
    assert not list(tmp_path.iterdir())


def test_a_task_of_another_class_is_an_error() -> None:
    class Other(Validated):
        pass

    fitted = trainer("single")
    fitted.fit(Elsewhere(20))
    fitted.validate(Validated(20))  # its base
    with pytest.raises(ValueError, match=r"task=Other: this trainer has trained Elsewhere\. Give a task of that class"):
        fitted.validate(Other(20))


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_a_trainer_within_itself_is_an_error(method: str) -> None:
    class Within(Callback):
        def on_epoch_end(self, trainer: Any) -> None:
            getattr(trainer, method)(Validated(20))

    outer = trainer("single", callbacks=Within())
    with pytest.raises(ValueError, match=rf"{method}\(\) was called while this trainer runs\. Use another Trainer"):
        outer.fit(Validated(20))
    outer.callbacks = []
    outer.fit(Validated(20))
    assert outer.update == 6
