"""Loggers: one history after a resume, grouped names, and services that are away."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Loss, Trainer
from engine.loggers import CSVLogger, GroupedLogger, Start, TensorBoardLogger, TrackerLogger
from tests.kit import ROOT
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Samples, data, parameters


class Tokens(Regression):
    """Each sample weighs 3; validated on seven of them."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return Loss(3 * len(batch[0]) * super().loss(model, batch), 3 * len(batch[0]))

    def validation_data(self) -> Any:
        return Samples(*data(7))

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}


class Dies(Callback):
    def __init__(self, update: int) -> None:
        self.update = update

    def on_update_end(self, trainer: Trainer) -> None:
        if trainer.update == self.update and trainer.strategy.rank == 0:
            trainer.loggers[1].writer.flush()  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: str, dies_at: int = 0) -> None:
    Trainer(
        micro_batch_size=2,
        accumulate_grad_batches=2,
        max_epochs=2,
        save_every_n_updates=3,
        validate_every_n_updates=2,
        loggers=["csv", "tensorboard"],
        callbacks=Dies(dies_at),
        run_dir=folder,
    ).fit(Tokens(17))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("P", [1, 2])
def test_a_killed_run_has_one_history(P: int, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(P, fit, str(whole))
    with pytest.raises(ChildError):
        run(P, fit, str(parts), 5)
    with (parts / "metrics.csv").open("a") as file:
        file.write("6,0.1")  # killed within a line
    run(P, fit, str(parts))
    for name in ("metrics.csv", "validation.csv"):
        assert table(parts / name) == table(whole / name)
    assert points(parts) == points(whole)
    records = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if "loss" in record]
    rows = table(parts / "metrics.csv")
    assert [int(row["update"]) for row in rows] == list(range(1, len(updates) + 1))
    assert [float(row["train/loss"]) for row in rows] == [record["loss"] for record in updates]
    assert [float(row["optim/grad_norm"]) for row in rows] == [record["grad_norm"] for record in updates]
    assert [int(row["data/samples"]) for row in rows] == [record["samples"] for record in updates]
    assert [float(row["data/weight"]) for row in rows] == [3 * record["samples"] for record in updates]
    validations = [record for record in records if "loss" not in record]
    means = [(int(row["update"]), float(row["validation/loss"])) for row in table(parts / "validation.csv")]
    assert means == [(record["update"], record["validation/loss"]) for record in validations]
    samples = {record["update"]: record["samples"] for record in updates}
    assert [int(row["data/samples"]) for row in table(parts / "validation.csv")] == [samples[u] for u, _ in means]


def test_a_column_that_comes_later_is_empty_before(tmp_path: Path) -> None:
    logger = CSVLogger()
    start = Start(tmp_path, 0, 0, {}, 0.0, {})
    logger.open(start)
    logger.log({"update": 1, "validation/a": 0.5})
    logger.log({"update": 2, "validation/a,b": 2.0})
    logger.close()
    logger.open(start._replace(update=2, validated_update=1))
    logger.log({"update": 2, "validation/a": 0.25})
    logger.close()
    rows = [(row["update"], row["validation/a"], row["validation/a,b"]) for row in table(tmp_path / "validation.csv")]
    assert rows == [("1", "0.5", ""), ("2", "0.25", "")]


def test_a_column_that_could_not_be_added_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    logger = CSVLogger()
    logger.open(Start(tmp_path, 0, 0, {}, 0.0, {}))
    logger.log({"update": 1, "validation/a": 0.5})
    (part := tmp_path / "validation.part").mkdir()  # where the table with the new column is written
    with pytest.raises(OSError, match=r"validation\.part"):
        logger.log({"update": 2, "validation/a": 1.5, "validation/b": 2.0})
    logger.log({"update": 3, "validation/a": 2.5})
    part.rmdir()
    logger.log({"update": 4, "validation/b": 3.0})
    logger.close()
    rows = [(row["update"], row["validation/a"], row["validation/b"]) for row in table(tmp_path / "validation.csv")]
    assert rows == [("1", "0.5", ""), ("3", "2.5", ""), ("4", "", "3.0")]


def test_a_tracker_is_imported_when_used_and_told_of_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_tracker.py").write_text(
        "told = []\n"
        "class Run:\n"
        "    def log(self, values, step): told.append((step, values))\n"
        "    def finish(self): told.append('finish')\n"
        "def init(project, config):\n"
        "    told.append((project, config['micro_batch_size']))\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trainer = Trainer(micro_batch_size=4, max_updates=2, loggers=TrackerLogger("some_tracker", {"project": "mine"}))
    assert "some_tracker" not in sys.modules
    trainer.fit(Tokens(8))
    from some_tracker import told

    assert (told[0], told[-1]) == (("mine", 4), "finish")
    assert [step for step, _ in told[1:-1]] == [1, 2, 2]
    assert told[1][1]["train/loss"] > 0
    assert [(told[n][1]["data/samples"], told[n][1]["data/weight"]) for n in (1, 2, 3)] == [(4, 12), (8, 24), (8, 24)]
    assert "validation/loss" in told[3][1]


class Away(GroupedLogger):
    """A service that is away: fails when opened, or at each update."""

    def __init__(self, at: str) -> None:
        self.at, self.tried = at, 0

    def fail(self, at: str) -> None:
        self.tried += at == "log"
        if at == self.at:
            raise ConnectionError("no route to host")

    def open(self, start: Start) -> None:
        super().open(start)
        self.fail("open")

    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        self.fail("log")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_a_logger_whose_service_is_away_ends_nothing(at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away, witness = Away(at), Away("")
    trainer = Trainer(micro_batch_size=4, max_updates=5, loggers=[away, witness], run_dir=str(tmp_path / "run"))
    with caplog.at_level(logging.WARNING, "tally"):
        trainer.fit(Tokens(8))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"Away failed in {at}(): ConnectionError: no route to host" in caplog.text
    assert (away.tried, witness.tried) == (0 if at == "open" else witness.tried, 5 + 3)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8
    reference = Trainer(micro_batch_size=4, max_updates=5)
    reference.fit(Tokens(8))
    assert parameters(trainer.model).equal(parameters(reference.model))


def test_what_is_no_logger_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loggers, run_dir, message in (
        ("mlflow", "run", "loggers='mlflow': give csv, tensorboard, wandb, or an object"),
        ([object()], "run", "give csv, tensorboard, wandb, or an object"),
        ("csv", None, "loggers='csv' writes into the run's folder: give a run_dir"),
        (CSVLogger(), None, "writes into the run's folder: give a run_dir"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(max_updates=1, loggers=loggers, run_dir=run_dir)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no module .no_tracker.\. Use pip install no_tracker"):
        TrackerLogger("no_tracker")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'tally-engine\[tensorboard\]'"):
        Trainer(max_updates=1, loggers="tensorboard", run_dir=str(tmp_path / "run"))


def test_nothing_is_imported_that_is_not_used() -> None:
    code = "import sys, engine.cli.main; print(sorted({'tensorboard', 'wandb', 'matplotlib'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class Pictures(Callback):
    def __init__(self, board: TensorBoardLogger) -> None:
        self.board = board

    def on_update_end(self, trainer: Trainer) -> None:
        if self.board.writer is not None:  # on process 0
            self.board.writer.add_histogram("weights", parameters(trainer.model), trainer.update)
            self.board.writer.add_image("picture", torch.zeros(3, 4, 4), trainer.update)


def test_the_writer_of_tensorboard_takes_images_and_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    @on_processes(2)
    def has_writer() -> bool:
        board = TensorBoardLogger()
        Trainer(
            micro_batch_size=2, max_updates=2, loggers=board, callbacks=Pictures(board), run_dir=str(tmp_path / "run")
        ).fit(Tokens(8))
        return board.writer is not None

    assert has_writer == [True, False]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("weights")] == [1, 2]
    assert [event.step for event in events.Images("picture")] == [1, 2]


def records_of_wandb(file: Path) -> list[Any]:
    """Return what wandb has written offline: LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


class Tuned(Tokens):
    """A task with an option of its own."""

    def __init__(self, hidden: int) -> None:
        super().__init__(8)
        self.hidden = hidden


def fit_with_wandb(folder: str, max_updates: int) -> None:
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"], os.environ["WANDB_DIR"] = "offline", "true", folder
    options = {"loggers": "wandb", "run_dir": f"{folder}/run"}
    Trainer(micro_batch_size=2, max_updates=max_updates, validate_every_n_updates=2, **options).fit(Tuned(32))  # type: ignore[arg-type]


@pytest.mark.slow  # seconds in which wandb starts and ends processes of its own
@pytest.mark.timeout(420)
def test_wandb_by_name_continues_one_run(tmp_path: Path) -> None:
    for max_updates in (3, 5):
        run(
            1, fit_with_wandb, str(tmp_path), max_updates, group=False, seconds=200
        )  # it waits for processes of its own
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["update"]: line["loss"] for line in lines if "loss" in line}
    means = {line["update"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    ids, history = set(), {}
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        records = records_of_wandb(file)
        started = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        ids.add(started.run_id)
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        for record in records:
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history[row["_step"]] = row
    assert len(ids) == 1
    assert (config["micro_batch_size"], config["task.hidden"], config["total_updates"]) == (2, 32, 5)
    assert (config["samples_per_epoch"], config["parameters"]) == (8, len(parameters(Tuned(1).model())))
    assert {update: row["train/loss"] for update, row in history.items()} == losses
    assert {update: row["validation/loss"] for update, row in history.items() if "validation/loss" in row} == means
