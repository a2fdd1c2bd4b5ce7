"""The end of a command: a documented exit status and one line, whatever happens outside."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine.cli.main
from engine import Callback, Trainer
from engine.callbacks import Progress
from engine.cli.main import main
from engine.errors import describe
from engine.output import Output
from engine.records.run_folder import RunFolder
from engine.signals import leave_status
from launch.start import SAID
from strategies import DDPStrategy
from tests.kit import ROOT
from tests.kit.hosts import until
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression


class Told(Regression):
    """Sends a signal to its process, at a moment of the command."""

    def __init__(self, number: int = 0, moment: str = "", rank: int = 0) -> None:
        super().__init__(16)
        self.number, self.moment, self.rank = number, moment, rank
        self.tell("made")

    def tell(self, moment: str) -> None:
        if self.moment == moment and os.environ.get("RANK", "0") == str(self.rank):
            os.kill(os.getpid(), self.number)
            time.sleep(0.3 if self.number == signal.SIGUSR1 else 10 if moment == "made" else 0)

    def configure_model(self) -> nn.Module:
        self.tell("built")
        return super().configure_model()


class Teller(Callback):
    """Has the task send its signal at events of the run."""

    def on_fit_end(self, trainer: Any) -> None:
        trainer.task.tell("at the end")

    def on_interruption(self, trainer: Any) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)


class Runaway(Regression):
    def __init__(self) -> None:
        super().__init__(16)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch) * torch.inf


class Dies(Callback):
    def on_update_end(self, trainer: Any) -> None:
        if trainer.strategy.rank == 1:
            os._exit(9)


class TakesTheDisk(Callback):
    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 4 and trainer.strategy.rank == 0:
            checkpoints = Path(trainer.settings.run_dir, "checkpoints")
            checkpoints.rmdir()
            checkpoints.touch()


def command(folder: Path, *words: str, task: str = "Told", P: int = 1) -> tuple[list[int], str]:
    """Run the command in P forks up to their very end; return their statuses and what they have written to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = ["--trainer.micro_batch_size=4", "--trainer.max_updates=4", f"--trainer.run_dir={folder / 'run'}"]
    children = []
    for rank in range(P):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(P)}
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` leaves it ignored, and so would the run
                error = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(error, 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - pytest has put another in its place
                engine.cli.main.PATIENCE = 1.0
                status = main([f"--task={__name__}.{task}", *settings, "--trainer.progress=false", *words])
                os.kill(os.getpid(), signal.SIGTERM)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    statuses: dict[int, int] = {}

    def ended() -> bool:
        for pid in set(children) - set(statuses):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(statuses) == P

    try:
        until(ended, 40, "the end of a command")
    finally:
        for pid in set(children) - set(statuses):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [statuses[pid] for pid in children], (folder / "stderr").read_text()


def events(folder: Path) -> list[str]:
    path = folder / "run" / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["made", "built", "at the end"])
def test_a_signal_at_any_moment_ends_as_documented(number: int, moment: str, tmp_path: Path) -> None:
    words = [
        f"--task.number={int(number)}",
        f"--task.moment={moment}",
        f"--trainer.callbacks={__name__}.Teller",
    ]
    stops = number != signal.SIGUSR1 and moment != "at the end"
    assert command(tmp_path, *words)[0] == [75 if stops else 0]
    assert events(tmp_path)[-1:] == ([] if stops and moment == "made" else ["interrupt" if stops else "end"])
    assert command(tmp_path)[0] == [0]


def test_a_run_without_a_folder_does_not_claim_to_be_saved(tmp_path: Path) -> None:
    words = ["--task.number=15", "--task.moment=built", "--trainer.run_dir=null"]
    assert command(tmp_path, *words)[0] == [-signal.SIGTERM]


def test_a_signal_to_one_of_two_that_start_stops_both_saved(tmp_path: Path) -> None:
    words = [
        "--task.number=15",
        "--task.moment=built",
        "--task.rank=1",
        f"--trainer.callbacks={__name__}.Teller",
    ]
    assert command(tmp_path, *words, P=2)[0] == [75, 75]
    assert events(tmp_path) == ["start", "save", "interrupt"]


def test_a_process_that_waits_for_another_in_vain_can_be_told_to_stop(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    if (pid := os.fork()) == 0:
        os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os._exit(main([f"--task={__name__}.Told", "--trainer.micro_batch_size=4", "--trainer.max_updates=4"]))
    try:
        until(listens, 30, "a store")
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(found[1]) == 75
        assert found[0] == pid
    finally:
        if found == (0, 0):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "P", "status", "line"),
    [
        (["--trainer.micro_batch_size=99"], 1, 2, "micro_batch_size=99"),
        (["--trainer.stop_after_n_skipped=2"], 1, 70, "2 updates in a row were not finite"),
        ([f"--trainer.callbacks={__name__}.TakesTheDisk"], 1, 74, "File exists"),
        ([f"--trainer.callbacks={__name__}.TakesTheDisk"], 2, 74, "File exists"),
        ([f"--trainer.callbacks={__name__}.Dies"], 2, 76, "lost contact with another process"),
    ],
)
def test_each_kind_of_failure_has_a_status_and_one_line(
    words: list[str], P: int, status: int, line: str, tmp_path: Path
) -> None:
    statuses, said = command(tmp_path, *words, task="Runaway" if status == 70 else "Told", P=P)
    assert statuses == [status, *[9 if status == 76 else status] * (P - 1)]
    assert line in said.splitlines()[-1]
    assert "Traceback" not in said
    assert status in SAID


LEFT_ALIVE = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from engine import Callback, Task, Trainer

class Toy(Task):
    def configure_model(self): return torch.nn.Linear(4, 1)
    def configure_optimizer(self, model): return torch.optim.SGD(model.parameters(), lr=0.1)
    def train_data(self):
        data = TensorDataset(torch.ones(400, 4), torch.ones(400, 1))
        if "stream" not in sys.argv: return data
        class Stream:
            def __iter__(self): yield from DataLoader(data, 4, num_workers=1)
        return Stream()
    def loss(self, model, batch): return (model(batch[0]) - batch[1]).square().mean()

class Ends(Callback):
    def on_update_end(self, trainer):
        if "exit" in sys.argv: sys.exit(3)
        raise KeyError("a bug of the user's")

try:
    Trainer(micro_batch_size=4, max_epochs=1, num_workers=1, callbacks=Ends()).fit(Toy())
except KeyError as error:
    if "kept" not in sys.argv: raise
    kept = error
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("error", 1),
        pytest.param("stream", 1, marks=pytest.mark.slow),
        pytest.param("exit", 3, marks=pytest.mark.slow),
        ("kept", 0),
    ],
)
def test_a_process_ends_whatever_keeps_its_loader_s_workers(how: str, status: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_ALIVE, how],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "killed by signal" not in done.stderr


class Pools(Callback):
    """Processes of the user's own, forked in a run that heeds signals."""

    def on_epoch_end(self, trainer: Any) -> None:
        fork = multiprocessing.get_context("fork")
        with fork.Pool(2) as pool:
            self.found = pool.map(abs, [-1, -2])
        process = fork.Process(target=time.sleep, args=(100,))
        process.start()
        process.terminate()
        process.join(20)
        self.status = process.exitcode


def test_processes_of_the_user_end_by_a_signal(tmp_path: Path) -> None:
    pools = Pools()
    Trainer("single", micro_batch_size=4, max_epochs=1, run_dir=str(tmp_path / "run"), callbacks=pools).fit(
        Regression(8)
    )
    assert (pools.found, pools.status) == ([1, 2], -signal.SIGTERM)


WRITES = """
import atexit, multiprocessing, sys
from engine import Trainer
from tests.kit.reference import Regression

def write(queue, path):
    with open(path, "w") as file:
        while (line := queue.get()) is not None:
            print(line, file=file)

queue = multiprocessing.get_context("fork").Queue()
writer = multiprocessing.get_context("fork").Process(target=write, args=(queue, sys.argv[1]), daemon=True)
writer.start()

def stop():
    queue.put(None)
    writer.join()

atexit.register(stop)
Trainer("single", micro_batch_size=4, max_epochs=1, num_workers=1).fit(Regression(8))
for line in range(50):
    queue.put(line)
"""


def test_a_daemonic_process_of_the_user_is_left_to_its_exit_handler(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WRITES, str(tmp_path / "lines")], env=environment, timeout=60, check=True)
    assert (tmp_path / "lines").read_text().split() == [str(line) for line in range(50)]


def test_output_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - it cannot be closed without an error
    with pytest.raises(OSError, match="No space left"):
        full.write("this one fails\n")
    monkeypatch.setattr(sys, "stdout", full)
    trainer = Trainer("single", micro_batch_size=4, max_updates=4, callbacks=Progress(seconds=0))
    trainer.fit(Regression(16))
    monkeypatch.undo()
    assert trainer.update == 4
    with suppress(OSError):
        full.close()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_escapes_what_its_encoding_cannot_hold(encoding: str) -> None:
    kept = io.BytesIO()
    stream = io.TextIOWrapper(kept, encoding, write_through=True)
    print("caf\udce9", file=Output(stream))
    assert kept.getvalue() == b"caf\\udce9\n"


def test_a_command_whose_reader_has_gone_comes_to_its_end(tmp_path: Path) -> None:
    settings = ["--trainer.max_updates=4", "--trainer.micro_batch_size=4", "--trainer.run_dir=run"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "engine" / "run.py"), f"--task={__name__}.Talks", *settings],
        stdout=writer,
        stderr=writer,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0
    assert events(tmp_path)[-1] == "end"


class Talks(Regression):
    def __init__(self) -> None:
        super().__init__(16)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        print("a line of the task's own", flush=True)
        return super().loss(model, batch)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing: expected it beside WORLD_SIZE=2. "),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc': expected a whole number of at least 1. "),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='': expected"),
        ({"RANK": "3"}, "RANK='3': expected a whole number of at least 0 and below WORLD_SIZE=1. "),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1': expected"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x': expected"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is missing: expected it beside WORLD_SIZE=2. "),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)
def test_an_environment_that_cannot_be_is_named_at_once(
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--trainer.strategy=ddp", "--trainer.run_dir=run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"engine/run.py: {message}")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


class UntellableError(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


ODD: dict[str, Callable[[], Exception]] = {
    "half a character": lambda: ValueError(os.fsdecode(b"caf\xe9.png is no image")),
    "no text": UntellableError,
    "a number of 400 digits": lambda: ValueError(10**400),
}


class Raises(Callback):
    def __init__(self, odd: str) -> None:
        self.odd = odd

    def on_update_end(self, trainer: Any) -> None:
        if trainer.strategy.rank == 0:
            raise ODD[self.odd]()


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_error_is_told_to_all_and_kept(odd: str, tmp_path: Path) -> None:
    text = describe(ODD[odd]())
    if odd == "no text":
        assert text == "UntellableError: its text raises RuntimeError"
        return

    def fit_odd() -> None:
        Trainer(
            DDPStrategy(device="cpu"),
            micro_batch_size=4,
            callbacks=Raises(odd),
            run_dir=str(tmp_path / "run"),
            max_epochs=1,
        ).fit(Regression(64))

    with pytest.raises(ChildError) as raised:
        run(2, fit_odd, seconds=30)
    assert f"process 0 failed: {text}" in raised.value.errors[1]
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"]) == ("fail", text)


def test_records_keep_odd_names_and_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.rewind(0, 0)
    folder.log({"update": 1, "caf\udce9": 2.5, "long": 10**20, "longer": 10**400, "nan": float("nan")})
    folder.close()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"update": 1, "caf\\udce9": 2.5, "long": 1e20, "longer": None, "nan": None}


def test_a_status_that_another_process_has_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "status"
    monkeypatch.setenv("TALLY_STATUS", str(kept))
    kept.touch()
    leave_status(None)  # a run begins: nobody knows its status
    assert not kept.exists()
    leave_status(75)  # another process was interrupted while it started
    leave_status(None)
    assert kept.read_text() == "75"
