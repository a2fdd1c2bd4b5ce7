"""The meaning of `run_dir` and `resume`: resumed, refused, extended, set aside, never overwritten."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Trainer
from engine.checkpoint.files import pointed
from engine.errors import UserError
from tests.kit.hosts import until
from tests.kit.killed import Full, N, history, same
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Samples


def fit_elsewhere(folder: str | None, options: dict[str, Any]) -> Any:
    task = options.pop("task", None) or Full(normalises=False, adaptive=False)
    trainer = Trainer("single", **{"micro_batch_size": N, "max_epochs": 1, "run_dir": folder, **options})
    trainer.fit(task)
    return trainer


class Wider(Full):
    def configure_model(self) -> nn.Module:
        return nn.Linear(5, 1).double()


class Shorter(Full):
    def train_data(self) -> Any:
        return Samples(self.x[:20], self.y[:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed was 0 and is 3. Use a new run_dir, or resume_with_changes=True"),
        ({"accumulate_grad_batches": 2}, r"an update was 2 samples \(accumulate_grad_batches=1\) and is 4 samples"),
        ({"micro_batch_size": 3}, "micro_batch_size was 2 and is 3"),
        ({"task": Shorter(False, False)}, "the number of training samples was 23 and is 20"),
        ({"task": Full(False)}, "the optimizer was SGD and is AdamW"),
        (
            {"task": Wider(), "resume_with_changes": True},
            r"is of another model: 0.bias is torch.float64 \(8,\) there and",
        ),
    ],
    ids=["seed", "K", "N", "data", "optimizer", "model"],
)
def test_a_checkpoint_of_another_run_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "run"), {})
    with pytest.raises(ValueError, match=message):
        fit_elsewhere(str(tmp_path / "run"), {"max_epochs": 2, **options})
    if "resume_with_changes" not in options and "the optimizer" not in message:
        trainer = fit_elsewhere(str(tmp_path / "run"), {"max_epochs": 2, "resume_with_changes": True, **options})
        assert trainer.epoch == 2


def test_a_finished_run_stays_finished_and_can_be_extended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    first = fit_elsewhere(folder, {"max_epochs": 2})
    again = fit_elsewhere(folder, {"max_epochs": 2})
    assert (again.update, again.samples, again.metrics) == (first.update, first.samples, first.metrics)
    longer = fit_elsewhere(folder, {"max_epochs": 3})
    at_once = fit_elsewhere(str(tmp_path / "other"), {"max_epochs": 3})
    assert same(longer.model.state_dict(), at_once.model.state_dict())
    assert history(tmp_path / "run") == history(tmp_path / "other")


def test_resume_never_wants_a_new_folder_and_a_path_is_gone_on_from(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    first = fit_elsewhere(folder, {})
    with pytest.raises(FileExistsError, match="nothing else is in"):
        fit_elsewhere(folder, {"resume": "never"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not a run")
    with pytest.raises(FileExistsError, match="nothing else is in"):
        fit_elsewhere(str(tmp_path / "notes"), {})
    for path in (folder, f"{folder}/checkpoints", str(next(Path(folder).glob("checkpoints/update-*")))):
        second = fit_elsewhere(str(tmp_path / Path(path).name), {"resume": path, "max_epochs": 2})
        assert second.update == 2 * first.update
    with pytest.raises(ValueError, match="resume='nowhere': no such checkpoint"):
        fit_elsewhere(folder, {"resume": "nowhere"})


def test_what_writes_files_needs_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"expected the package safetensors.*Use pip install safetensors"):
        Trainer(max_epochs=1, run_dir=str(tmp_path / "run"))
    fit_elsewhere(None, {})


def test_pretrained_weights_start_a_run_and_nothing_else(tmp_path: Path) -> None:
    first = fit_elsewhere(str(tmp_path / "run"), {})
    weights = str(tmp_path / "run" / "model.safetensors")
    second = fit_elsewhere(None, {"weights": weights, "max_epochs": None, "max_updates": 1})
    assert second.update == 1
    before, after = first.model.state_dict(), second.model.state_dict()
    assert all((before[name] - after[name]).abs().max() < 0.1 for name in before)  # one step
    with pytest.raises(ValueError, match=r"weights='no.safetensors': no such file"):
        fit_elsewhere(None, {"weights": "no.safetensors"})
    with pytest.raises(ValueError, match="is of another model"):
        fit_elsewhere(None, {"weights": weights, "task": Wider()})


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    first = fit_elsewhere(str(folder), {"save_every_n_updates": 5})
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    again = fit_elsewhere(str(folder), {"save_every_n_updates": 5})
    assert f"{newest} is damaged: model.safetensors does not have the SHA-256" in caplog.text
    assert same(again.model.state_dict(), first.model.state_dict())


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"keep_best": "min:loss", "validate_every_n_updates": 2, "keep_last_checkpoints": 1, "max_epochs": 3}
    fit_elsewhere(str(folder), options)
    losses = {r["update"]: r["validation/loss"] for r in history(folder) if "validation/loss" in r}
    best = (folder / "checkpoints" / "best").read_text().strip()
    assert best == f"update-{min(losses, key=losses.__getitem__):08d}"
    assert len(list((folder / "checkpoints").glob("update-*"))) <= 2
    resumed = fit_elsewhere(str(tmp_path / "on"), {"resume": str(folder / "checkpoints" / best), **options})
    assert resumed.epoch == 3


class Score(Callback):
    """Validations whose score is given by update; the run stops after the last of these."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_update_end(self, trainer: Trainer) -> None:
        if trainer.update == max(self.scores):
            trainer.stop(is_collective=True)

    def on_validation_end(self, trainer: Trainer) -> None:
        trainer.metrics["score"] = self.scores[trainer.update]


def test_best_never_names_a_checkpoint_that_is_not_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def best(scores: dict[int, float], keep_last: int = 2, resume: str = "auto", rule: str = "max:score") -> str | None:
        options = {"validate_every_n_updates": 2, "save_every_n_updates": 2, "keep_last_checkpoints": keep_last}
        how = {"run_dir": str(tmp_path / "run"), "resume": resume, "keep_best": rule, "callbacks": Score(scores)}
        Trainer(micro_batch_size=4, max_epochs=9, validate_every_n_epochs=None, **options, **how).fit(Full(False))
        return pointed(folder, "best")

    assert best({2: 5.0, 4: 3.0, 6: 9.0}, keep_last=3) == "update-00000006"
    assert best({6: 1.0}, 3, str(folder / "update-00000004")) == "update-00000002"  # 6 is another one now
    assert best({8: 9.0}) == "update-00000008"
    assert best({8: 1.0, 10: 0.0}, 2, str(folder / "update-00000006")) == "update-00000008"  # 2 is gone
    assert best({12: 0.5}, rule="min:score") == "update-00000012"  # though more than 0.0, it is the first by this rule


def fit_blind(parent: Path, resume: str) -> int:
    os.chdir(parent / str(torch.distributed.get_rank()))  # as on another host: the same name is another folder
    trainer = Trainer("ddp", micro_batch_size=4, max_epochs=1, run_dir=resume, resume=resume)
    trainer.fit(Full(normalises=False))
    return trainer.update


def test_a_folder_that_not_all_hosts_see(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    with pytest.raises(ChildError, match=r"process 1 cannot see it\. Use storage shared by all hosts"):
        run(2, fit_blind, tmp_path, "auto", seconds=30)
    assert run(2, fit_blind, tmp_path, "never", seconds=30) == [3, 3]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("update-*"))


def test_going_back_leaves_what_came_after_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"save_every_n_updates": 3, "keep_last_checkpoints": 2}
    fit_elsewhere(str(folder), options)
    assert names(folder) == ["update-00000009", "update-00000012-2"]
    back = str(folder / "checkpoints" / "update-00000009")
    fit_elsewhere(str(folder), {"resume": back, "max_epochs": None, "max_updates": 10, **options})
    assert names(folder) == ["update-00000009", "update-00000010"]
    assert len(list((folder / "checkpoints").glob("set-aside-update-00000012*"))) == 1
    assert [r["update"] for r in history(folder) if "loss" in r] == list(range(1, 11))


def test_where_no_checkpoint_is_whole_nothing_is_started_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit_elsewhere(str(folder), {})
    before = history(folder)
    for name in names(folder):
        (folder / "checkpoints" / name / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* is whole and of this run. Restore one"):
        fit_elsewhere(str(folder), {})
    assert history(folder) == before


def test_the_same_command_with_a_path_goes_on_with_its_own_run(tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "first"), {})
    options = {"resume": str(tmp_path / "first"), "max_epochs": 3}
    fit_elsewhere(str(tmp_path / "second"), {**options, "max_updates": 20})
    assert fit_elsewhere(str(tmp_path / "second"), options).update == 36
    assert [r["update"] for r in history(tmp_path / "second") if "loss" in r] == list(range(13, 37))


def test_another_optimizer_starts_afresh_where_changes_are_allowed(tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "run"), {})
    options = {"max_epochs": 2, "task": Full(normalises=False), "resume_with_changes": True}
    assert fit_elsewhere(str(tmp_path / "run"), options).update == 24


def test_a_folder_with_another_s_config_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileExistsError, match="nothing else is in"):
        fit_elsewhere(str(tmp_path), {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


class Waits(Callback):
    """Says that the run has begun, and waits for the other's answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Any) -> None:
        (self.folder / "begun").touch()
        until((self.folder / "answered").exists, 30, "the other run's refusal")


def test_a_folder_that_another_process_is_writing_is_refused(tmp_path: Path) -> None:
    @on_processes(2, group=False)
    def results() -> str:
        is_first = os.environ.pop("RANK") == "0"
        os.environ.pop("WORLD_SIZE")  # each is a run of its own
        if is_first:
            fit_elsewhere(str(tmp_path / "run"), {"callbacks": Waits(tmp_path)})
            return ""
        until((tmp_path / "begun").exists, 30, "the first run's begin")
        try:
            fit_elsewhere(str(tmp_path / "run"), {})
        except FileExistsError as error:
            return str(error)
        finally:
            (tmp_path / "answered").touch()
        return "not refused"

    _, refusal = results
    assert "another run is writing it" in refusal
    fit_elsewhere(str(tmp_path / "alone"), {})
    assert history(tmp_path / "run") == history(tmp_path / "alone")
