"""`save_frozen=False`: what is trained is saved, and goes back only onto the base that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from engine import Callback, Trainer
from engine.callbacks import EMA
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, parameters

TRAINED = {"2.weight", "2.bias", "4.weight", "4.bias"}


class OnBase(Regression):
    """Trains what comes after a frozen first layer, and its BatchNorm."""

    def __init__(self, base: float = 1.0) -> None:
        super().__init__(24)
        self.base = base

    def configure_model(self) -> nn.Module:
        model = super().configure_model()
        with torch.no_grad():
            model[0].weight.mul_(self.base)
        model[0].requires_grad_(False)
        return model

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)

    def validation_data(self) -> Any:
        return TensorDataset(self.x[:8], self.y[:8], torch.arange(8))


def trainer(strategy: str, **options: Any) -> Trainer:
    defaults = {"micro_batch_size": 2, "accumulate_grad_batches": 4, "max_epochs": 3, "save_frozen": False}
    return Trainer(strategy, **{**defaults, **options})


def fit(strategy: str, folder: str, updates: int | None, base: float = 1.0, **options: Any) -> Any:
    fitted = trainer(strategy, run_dir=folder, max_updates=updates, **options)
    fitted.fit(OnBase(base))
    return fitted.metrics["loss"]


def saved(folder: Path) -> list[set[str]]:
    newest = folder / "checkpoints" / (folder / "checkpoints/latest").read_text().strip()
    return [{*load_file(path / "model.safetensors")} for path in (newest, folder)]


PLACES = [("single", 1), ("dp", 1), ("ddp", 2), ("fsdp", 2), ("pipeline", 2)]


@pytest.mark.parametrize(("strategy", "P"), PLACES)
def test_what_is_trained_is_saved_and_resumed(strategy: str, P: int, tmp_path: Path) -> None:
    whole = run(P, fit, strategy, str(tmp_path / "whole"), None, 1.0, group=P > 1)
    for updates in (2, None):
        found = run(P, fit, strategy, str(tmp_path / "run"), updates, 1.0, group=P > 1)
    assert found == whole
    assert saved(tmp_path / "run") == [TRAINED, TRAINED]
    again = trainer("single", run_dir=str(tmp_path / "run")).validate(OnBase())
    named = trainer("single", weights=str(tmp_path / "run/model.safetensors")).validate(OnBase())
    assert again["loss"] == named["loss"] == pytest.approx(whole[0], rel=1e-12)


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("ddp", 2)])
def test_another_base_is_refused(strategy: str, P: int, tmp_path: Path) -> None:
    run(P, fit, strategy, str(tmp_path / "run"), 2, 1.0)
    message = r"trained on another base: 1 of its 2 frozen parameters differ \(0.weight, ...\). Load the same base"
    with pytest.raises(ChildError, match=message) as raised:
        run(P, fit, strategy, str(tmp_path / "run"), None, 1.01)
    assert all("another base" in error for error in raised.value.errors.values())
    for source in ({"run_dir": str(tmp_path / "run")}, {"weights": str(tmp_path / "run/model.safetensors")}):
        with pytest.raises(ValueError, match=message):
            trainer("single", **source).validate(OnBase(1.01))


def test_the_base_may_be_given_as_weights(tmp_path: Path) -> None:
    pretrained = trainer("single", run_dir=str(tmp_path / "base"), save_frozen=True)
    pretrained.fit(OnBase(2.0))
    weights = str(tmp_path / "base/model.safetensors")
    for name, updates in (("whole", None), ("run", 2), ("run", None)):
        found = fit("single", str(tmp_path / name), updates, weights=weights)
        if name == "whole":
            expected = found
    assert found == expected
    with pytest.raises(ValueError, match="trained on another base"):
        fit("single", str(tmp_path / "run"), None)


class Part(Callback):
    """Thaws the bias of the first layer for one update, between two saves."""

    def on_update_end(self, trainer: Any) -> None:
        trainer.model[0].bias.requires_grad_(trainer.update == 4)


class WithBias(OnBase):
    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("ddp", 2)])
def test_what_has_learned_meanwhile_is_saved(strategy: str, P: int, tmp_path: Path) -> None:
    def fit_part(folder: str, updates: int | None) -> Any:
        fitted = trainer(strategy, run_dir=folder, max_updates=updates, callbacks=[Part(), EMA(0.5)])
        fitted.fit(WithBias())
        return parameters(fitted.model)

    whole = run(P, fit_part, str(tmp_path / "whole"), None)
    for updates in (2, 6, None):
        found = run(P, fit_part, str(tmp_path / "run"), updates)
    assert torch.equal(found[0], whole[0])
    learned = TRAINED | {"0.bias"}
    # DDP is wrapped again, which writes every parameter: all count as changed
    assert all(learned <= names <= learned | {"0.weight"} for names in saved(tmp_path / "run"))


def test_a_whole_checkpoint_goes_on_without_its_base(tmp_path: Path) -> None:
    fit("single", str(tmp_path / "run"), 2, save_frozen=True)
    assert "0.weight" in saved(tmp_path / "run")[0]
    fit("single", str(tmp_path / "run"), 4)
    assert saved(tmp_path / "run") == [TRAINED, TRAINED]
    fit("single", str(tmp_path / "run"), None, save_frozen=True)
    assert all("0.weight" in names for names in saved(tmp_path / "run"))


class Freezes(Callback):
    def on_epoch_start(self, trainer: Any) -> None:
        trainer.model[0].requires_grad_(trainer.epoch == 0)


def test_what_is_frozen_during_the_run_is_saved(tmp_path: Path) -> None:
    for updates in (5, None):
        trainer("single", run_dir=str(tmp_path), max_updates=updates, callbacks=Freezes()).fit(Regression(24))
        assert [len(names) for names in saved(tmp_path)] == [6, 6]


class Teacher(Callback):
    """Moves a frozen layer as self-distillation does: autograd does not count writes to `data`."""

    def on_update_end(self, trainer: Any) -> None:
        trainer.model[0].bias.data.mul_(0.5).add_(trainer.model[2].bias.data.mean())


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("fsdp", 2)])
def test_what_is_written_past_autograd_is_saved(strategy: str, P: int, tmp_path: Path) -> None:
    def fit_taught(folder: str, updates: int | None) -> Any:
        return fit(strategy, folder, updates, callbacks=Teacher())

    whole = run(P, fit_taught, str(tmp_path / "whole"), None, group=P > 1)
    for updates in (2, None):
        found = run(P, fit_taught, str(tmp_path / "run"), updates, group=P > 1)
    assert found == whole
    assert saved(tmp_path / "run") == [TRAINED | {"0.bias"}] * 2
