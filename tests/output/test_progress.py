"""Progress on screen: terminals of any width, pipes, one process, and the slowest process."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import select
import sys
import time
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine import Loss, Trainer
from engine.callbacks import Progress
from engine.callbacks.pace import Pace
from engine.update.message import Slowest
from tests.kit.processes import run
from tests.kit.reference import Regression, Samples, Watch, data

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Slow(Regression):
    """Takes its time; can fail; validates; each sample weighs 3."""

    def __init__(self, samples: int, seconds: float = 0.0, fails: bool = False) -> None:
        super().__init__(samples)
        self.seconds, self.fails, self.calls = seconds, fails, 0

    def loss(self, model: nn.Module, batch: Any) -> Any:
        time.sleep(self.seconds)
        self.calls += 1
        if self.fails and self.calls == 20:
            raise RuntimeError("no more")
        factor = math.nan if self.calls == 3 else 1.0
        return Loss(3 * len(batch[0]) * factor * super().loss(model, batch), 3 * len(batch[0]))

    def validation_data(self) -> Any:
        return Samples(*data(3))

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}


def in_terminal(fails: bool = False, **environment: str) -> str:
    """What a run of a second writes into a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm-256color", **environment})
        torch.set_num_threads(1)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # and not what pytest put in its place
        try:
            Trainer(micro_batch_size=1, max_epochs=2, progress=True).fit(Slow(20, 0.03, fails))
        finally:
            sys.stdout.flush()
            os._exit(0)
    written, end = b"", time.monotonic() + 60
    while select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    os.close(terminal)
    os.waitpid(pid, 0)
    return written.decode()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_of_any_width(columns: int) -> None:
    written = in_terminal(COLUMNS=str(columns))
    plain = ESCAPES.sub("", written)
    live = plain.partition("run folder: none (nothing is written)")[2]
    assert "\x1b[38;5" in written or "\x1b[36m" in written  # it has colour
    lines = re.split(r"[\r\n]+", live.partition("done:")[0])
    assert max(len(line.rstrip()) for line in lines) <= columns
    for detail in (
        "epoch 0 ",
        "epoch 1 ",
        "/40  0:00:0",
        "loss ",
        "grad norm ",
        "lr 0.1",
        "N 1 x K 1",
        "effective batch 1",
        "1 skipped",
    ):
        assert detail in live, detail
    assert re.search(r"\d samples/s", live)
    assert re.search(r"\d weight/s", live)
    assert "━" in live
    assert written.rstrip().endswith("done: 40 updates, 1 of them skipped, 40 samples")


@pytest.mark.parametrize(("columns", "shares_a_line"), [(90, False), (140, True)])
def test_training_and_machine_share_a_line_only_if_they_fit(columns: int, shares_a_line: bool) -> None:
    lines = re.split(r"[\r\n]+", ESCAPES.sub("\n", in_terminal(COLUMNS=str(columns))))
    training = [line for line in lines if line.startswith("loss ")]
    assert training
    assert {line.rstrip().endswith("effective batch 1") for line in training} == {not shares_a_line}


def test_epochs_and_updates_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Trainer("single", micro_batch_size=4, max_epochs=11, progress=True).fit(Slow(8))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 11
    assert len({line.index("loss") for line in lines}) == 1


def test_the_run_folder_is_shown_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer("single", micro_batch_size=4, max_epochs=1, progress=True, run_dir="runs/mine").fit(Regression(8))
    written = capsys.readouterr().out
    assert "run folder: runs/mine\n" in written
    assert written.endswith("done: 2 updates, 8 samples: runs/mine\n")


def test_no_colour() -> None:
    written = in_terminal(COLUMNS="60", NO_COLOR="1")
    styles = set(re.findall(r"\x1b\[([0-9;]*)m", written))
    assert styles <= {"", "0", "1"}  # bold is no colour
    assert "━" in written


def test_a_terminal_that_can_do_nothing_gets_plain_lines() -> None:
    written = in_terminal(TERM="dumb")
    assert not ESCAPES.search(written)
    assert "━" not in written
    assert "epoch 1  update 40/40  loss" in written


def test_an_error_leaves_the_terminal_clean() -> None:
    written = in_terminal(fails=True, COLUMNS="60")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again


def told(seconds: float = 0.0, slow: int | None = None, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """What a process writes into a file, and its records."""
    watch, rank = Watch(), int(os.environ.get("RANK", 0))
    with redirect_stdout(io.StringIO()) as written:
        trainer = Trainer(micro_batch_size=2, max_updates=6, callbacks=[watch, Progress(seconds)], **options)
        trainer.fit(Slow(40, 0.1 if rank == slow else 0.0))
    return written.getvalue(), watch.records


def test_a_pipe_gets_a_plain_line_with_what_the_record_has() -> None:
    (written, records), (other, _) = run(2, told)
    assert other == ""  # process 0 speaks
    lines = [line for line in written.splitlines() if "grad norm" in line]
    assert not ESCAPES.search(written)
    for line, record in zip(lines, records, strict=True):
        expected = [
            f"epoch {record['epoch']}  update {record['update']}/6",
            f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3g}  lr 0.1  N 2 x K 1  effective batch 4",
            " samples/s",
            " weight/s",
            " MiB",
            *(["  1 skipped"] if record["skipped"] else []),
            " left",
        ]
        places = [line.find(part) for part in expected]
        assert places == sorted(places), line
        assert min(places) == 0, line
    assert [line for line in written.splitlines() if "validation: loss" in line]


def test_a_pipe_gets_no_more_lines_than_that() -> None:
    written, _ = told(1000.0)
    assert "grad norm" not in written
    assert "update 6/6  loss" in written  # validation has a line of its own


def test_the_slow_process_is_named_although_all_wait_for_it() -> None:
    written = run(3, lambda: told(slow=1, accumulate_grad_batches=2)[0])[0]
    last = [line for line in written.splitlines() if "grad norm" in line][-1]
    assert "process 1 is slow: " in last
    assert "ms of its own per update, the others " in last


def at(update: int, slowest: Slowest | None = None) -> Any:
    return SimpleNamespace(
        update=update,
        epoch=0,
        samples=10 * update,
        weight=70.0 * update,
        slowest=slowest,
        plan=SimpleNamespace(samples=100),
        settings=SimpleNamespace(max_epochs=5, max_updates=None),
        schedule=SimpleNamespace(at=lambda *place: SimpleNamespace(effective_batch=10)),
    )


def test_pace() -> None:
    pace = Pace(seconds=10.0)
    pace.restart(at(4), 100.0)
    assert pace.rates() == (0.0, 0.0)
    assert pace.left(at(4)) is None
    pace.see(at(8), 102.0)
    assert pace.rates() == (20.0, 140.0)
    assert pace.left(at(8)) == timedelta(seconds=(500 - 80) / 20)
    limited = at(8)
    limited.settings = SimpleNamespace(max_epochs=5, max_updates=12)
    assert pace.left(limited) == timedelta(seconds=(12 - 8) * 10 / 20)
    unbounded = at(8)
    unbounded.plan = None
    assert pace.left(unbounded) is None
    pace.see(at(108), 112.5)  # the first point is too old now
    assert pace.rates() == pytest.approx((1000 / 10.5, 7000 / 10.5))
    assert pace.slow_process(at(108)) == ""
    waited_for = at(108, Slowest(2, 0.1, 0.02))
    assert pace.slow_process(waited_for) == "process 2 is slow: 100 ms of its own per update, the others 20"
    assert pace.slow_process(at(108, Slowest(2, 0.1, 0.09))) == ""  # 1 of 10.5 seconds
