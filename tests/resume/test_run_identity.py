"""A folder belongs to one run: whatever happens to its name while runs live, nothing of one ends in another."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine import Callback
from engine.cli import main as command
from engine.errors import RunDirLostError, RunDirTakenError, StorageError
from engine.records import lock
from engine.records.run_folder import MARK, RunFolder
from tests.kit.hosts import until
from tests.kit.killed import Full, history, same
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.run_folders import fit


def updates(folder: Path) -> list[int]:
    return [record["update"] for record in history(folder) if "loss" in record]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class At(Callback):
    """Does something after an update, on process 0."""

    def __init__(self, update: int, action: Callable[[], Any]) -> None:
        self.update, self.action = update, action

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == self.update and trainer.strategy.rank == 0:
            for save in (thread for thread in threading.enumerate() if thread.name == "tally-save"):
                save.join()
            self.action()


def other_run(folder: Path) -> None:
    fit(folder, seed=7, max_epochs=None, max_updates=4)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("aside"))


def replaced(folder: Path) -> None:
    moved(folder)
    other_run(folder)


def copied(folder: Path) -> None:
    moved(folder)
    shutil.copytree(folder.with_name("aside"), folder)


def copied_and_resumed(folder: Path) -> None:
    copied(folder)
    fit(folder)


def replaced_behind_the_lock(folder: Path) -> None:
    """As on a network disk that gives a new file the inode of a deleted one."""
    config = json.loads((folder / "config.json").read_text())
    config[MARK]["start"] = "another"
    (folder / "config.json").write_text(json.dumps(config))


LOSSES = [moved, shutil.rmtree, replaced, copied, copied_and_resumed, replaced_behind_the_lock]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("update", [7, 12], ids=["between two saves", "at the end"])
def test_a_run_that_loses_its_folder_saves_beside_it(loss: Callable[[Path], Any], update: int, tmp_path: Path) -> None:
    folder, lost = tmp_path / "run", tmp_path / "run-lost"
    found: dict[str, bytes] = {}

    def lose() -> None:
        loss(folder)
        found.update(contents(folder) if folder.exists() else {})

    with pytest.raises(RunDirLostError, match=r"moved, deleted or replaced\. Use run_dir='.*run-lost' to resume"):
        fit(folder, callbacks=At(update, lose))
    assert (contents(folder) if folder.exists() else {}) == found or loss is replaced_behind_the_lock
    saved = max(10, update)
    assert updates(lost) == list(range(1, saved + 1))
    events = [json.loads(line)["event"] for line in (lost / "events.jsonl").read_text().splitlines()]
    assert (events[0], events[-1]) == ("start", "fail")
    resumed, undisturbed = fit(lost), fit(tmp_path / "other")
    assert same(resumed.model.state_dict(), undisturbed.model.state_dict())
    assert history(lost) == history(tmp_path / "other")


def test_a_second_loss_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RunDirLostError):
            fit(tmp_path / "run", callbacks=At(5, lambda: shutil.rmtree(tmp_path / "run")))
    assert updates(tmp_path / "run-lost") == updates(tmp_path / "run-lost-2")


def test_all_processes_hear_that_the_folder_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ChildError) as ends:
        run(2, lambda: fit(folder, "ddp", callbacks=At(2, lambda: shutil.rmtree(folder))))
    assert len(ends.value.errors) == 2
    assert all("RunDirLostError" in error and "run-lost' to resume" in error for error in ends.value.errors.values())


def test_tables_follow_a_folder_that_is_moved(tmp_path: Path) -> None:
    folder, aside = tmp_path / "run", tmp_path / "aside"
    options = {"loggers": ["csv", "tensorboard"], "save_every_n_updates": None, "validate_every_n_updates": 6}
    with pytest.raises(RunDirLostError):
        fit(folder, callbacks=At(5, lambda: replaced(folder)), **options)
    assert not {"metrics.csv", "validation.csv", "tensorboard"} & {path.name for path in folder.iterdir()}
    assert len((aside / "metrics.csv").read_text().splitlines()) == 13
    assert len((aside / "validation.csv").read_text().splitlines()) == 3
    assert len(list((aside / "tensorboard").iterdir())) == 1


class Waits(Full):
    """Builds its model when another run has ended, as one that starts slowly does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(normalises=False, adaptive=False)
        self.folder = folder

    def configure_model(self) -> nn.Module:
        (self.folder / "building").touch()
        until((self.folder / "ended").exists, 30, "the other run's end")
        return super().configure_model()


@pytest.mark.parametrize("resume", ["auto", "never", "a finished run"])
def test_of_two_starts_the_second_is_refused_even_after_the_first_has_ended(resume: str, tmp_path: Path) -> None:
    if resume == "a finished run":
        fit(tmp_path / "run")
    how = "never" if resume == "never" else "auto"

    @on_processes(2, group=False)
    def results() -> str:
        is_first = os.environ.pop("RANK") == "0"
        os.environ.pop("WORLD_SIZE")  # each is a run of its own
        if is_first:
            until((tmp_path / "building").exists, 30, "the other run's start")
            fit(tmp_path / "run", resume=how, max_epochs=2)
            (tmp_path / "ended").touch()
            return ""
        try:
            fit(tmp_path / "run", resume=how, seed=1, resume_with_changes=True, task=Waits(tmp_path))
        except FileExistsError as error:
            return str(error)
        return "not refused"

    _, refusal = results
    assert "Use a new folder" in refusal
    assert updates(tmp_path / "run") == list(range(1, 25))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0


def test_a_folder_that_fills_before_its_lock_is_free_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock.locked(tmp_path / ".lock")

    def end(seconds: float) -> None:
        (tmp_path / "config.json").write_text(json.dumps({MARK: {}}))
        held.close()

    monkeypatch.setattr(lock.time, "sleep", end)
    with pytest.raises(RunDirTakenError, match="expected a folder that nothing else is in"):
        RunFolder(tmp_path)


def test_two_trainers_of_one_process_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.locked, "__defaults__", (0.2,))
    refused: list[BaseException] = []

    def second() -> None:
        try:
            fit(tmp_path / "run", max_epochs=2)
        except RunDirTakenError as error:
            refused.append(error)

    def from_a_thread() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    fit(tmp_path / "run", callbacks=[At(2, second), At(8, from_a_thread)])
    assert len(refused) == 2
    assert updates(tmp_path / "run") == list(range(1, 13))
    fit(tmp_path / "run", max_epochs=2)  # and the folder is free again


def test_a_start_that_fails_leaves_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.locked, "__defaults__", (0.2,))
    fit(tmp_path / "run")
    checkpoints = (tmp_path / "run" / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(OSError, match="checkpoints") as error:
        fit(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").unlink()
    checkpoints.rename(tmp_path / "run" / "checkpoints")
    assert fit(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoints" / "update-00000012")).update == 12
    assert error.value.__traceback__ is not None  # kept, as a notebook keeps the last one


def test_a_link_to_a_run_is_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--task=launch.recipes.digits.Digits", "--trainer.progress=false", "--trainer.max_updates"]
    assert command.main([*options, "2", "--trainer.run_dir=runs/first"]) == 0
    assert command.main([*options, "4", "--trainer.run_dir=runs/latest"]) == 0
    assert os.readlink("runs/latest") == "first"
    assert updates(tmp_path / "runs" / "first") == [1, 2, 3, 4]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="expected a folder, found a link to itself"):
        fit(tmp_path / "loop")
    os.remove("runs/latest")
    assert command.main([*options, "1", "--trainer.run_dir=runs/latest"]) == 0  # a folder by that name
    assert updates(tmp_path / "runs" / "latest") == [1]


def test_a_run_may_change_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    fit(Path("run"), callbacks=At(2, lambda: os.chdir("elsewhere")))
    assert updates(tmp_path / "run") == list(range(1, 13))
    assert not os.listdir(tmp_path / "elsewhere")


def test_two_commands_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "FRESH", "runs/now")
    configs = [command.parse([])[1] for _ in range(3)]
    for config in configs:
        command._claim_fresh_folder(config)
    assert [config.trainer.run_dir for config in configs] == ["runs/now", "runs/now-2", "runs/now-3"]


def test_a_command_whose_runs_are_elsewhere_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("storage/runs", "runs")  # to a folder that is not there yet
    config = command.parse([])[1]
    command._claim_fresh_folder(config)
    assert (tmp_path / "storage" / config.trainer.run_dir).is_dir()
    os.remove("runs")
    Path("runs").touch()
    with pytest.raises(StorageError, match=r"run_dir='runs' could not be written"):
        command._claim_fresh_folder(command.parse([])[1])


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "run")
    fit(tmp_path / "other", max_epochs=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(tmp_path / "other" / "checkpoints" / "update-00000024", checkpoints / "update-00000024")
    (checkpoints / "latest").write_text("update-00000024")
    assert fit(tmp_path / "run").update == 12
    assert "update-00000024 is of run" in caplog.text
    for path in checkpoints.glob("update-00000010*"):
        shutil.rmtree(path)
    shutil.rmtree(checkpoints / "update-00000012")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "update-00000024", checkpoints / "update-00000024")
    with pytest.raises(ValueError, match="is whole and of this run"):
        fit(tmp_path / "run")


def test_records_are_on_disk_before_the_checkpoint_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[tuple[str, int]] = []

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        lines = path.read_bytes().count(b'"loss"') if path.name == "metrics.jsonl" else 0
        forced.append((path.name, lines))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fit(tmp_path / "run")
    last = 0
    saves = 0
    for name, lines in forced:
        last = lines if name == "metrics.jsonl" else last
        if name == "state.json":
            saves += 1
            assert last >= min(5 * saves, 12)
    assert saves == 3


def test_a_resume_cuts_what_no_record_is(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + "[" * 100_000 + "\n" + "\0" * 50)
    fit(tmp_path / "run", max_epochs=2)
    assert updates(tmp_path / "run") == list(range(1, 25))


def test_the_history_of_a_branch_begins_where_it_branched(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    for epochs in (2, 3):
        fit(tmp_path / "branch", resume=str(tmp_path / "run"), max_epochs=epochs)
    assert updates(tmp_path / "branch") == list(range(13, 37))
