"""A process that fails, dies or stalls: the others end within the timeout, and say who it was and what it was doing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine import Callback, Trainer
from engine.training.heartbeat import Heartbeat
from strategies import DDPStrategy
from tests.kit.hosts import until
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, Samples


def rank() -> int:
    return int(os.environ["RANK"])


class Slow(Samples):
    """Does what `how` says, on process 1, when it is asked for a sample in the middle of a window."""

    how: Any = None

    def __getitem__(self, index: int) -> Any:
        if index == 21 and self.how is not None:
            self.how()
        return super().__getitem__(index)


class Task(Regression):
    how: Any = None
    in_loss: Any = None

    def train_data(self) -> Any:
        data = Slow(self.x, self.y)
        data.how = self.how
        return data

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        if self.in_loss is not None and 21 in batch[2]:
            self.in_loss()
        return loss


class Breaks(Callback):
    def on_update_end(self, trainer: Any) -> None:
        if rank() == 1 and trainer.update == 2:
            raise KeyError("my callback")


def fit(where: str, heard: Path) -> None:
    def stall() -> None:
        until(heard.exists, 15, "the other process's error")

    Heartbeat.__init__.__defaults__ = (0.2,)
    task = Task(64)
    if where == "fetch":
        task.how = stall
    elif where == "loss":
        task.in_loss = stall
    elif where == "death":
        task.in_loss = lambda: (time.sleep(1.5), os.kill(os.getpid(), signal.SIGKILL))
    trainer = Trainer(
        DDPStrategy(timeout_seconds=4),
        micro_batch_size=4,
        accumulate_grad_batches=2,
        max_epochs=1,
        shuffle=False,
        callbacks=Breaks() if where == "callback" else None,
    )
    try:
        trainer.fit(task)
    finally:
        if rank() == 0:
            heard.touch()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("fetch", r"process 1 last reported \d s ago: fetching micro-batch 1 of update 1 for \d s"),
        ("loss", r"process 1 last reported \d s ago: computing micro-batch 1 of update 1 for \d s"),
        ("death", r"process 1 last reported \d s ago: computing micro-batch 1 of update 1 for \d s"),
        ("callback", r"process 1 failed: KeyError: 'my callback'"),
    ],
)
def test_a_silence_has_a_name(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(ChildError) as raised:
        run(2, fit, where, tmp_path / "heard", seconds=20, timeout=4)
    text = raised.value.errors[0]
    assert "engine.errors.ProcessFailureError: lost contact with another process in update" in text
    assert re.search(message, text), text


ENDS_WHILE_A_STORE_IS_ASKED = """
import sys
import time
from datetime import timedelta
from torch.distributed import TCPStore
from strategies.status_board import StatusBoard

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
asked = []


class Store:
    def check(self, keys):
        asked.append(keys)
        return False


board = StatusBoard(Store(), 0, 1)
board._patiently(lambda: store.wait(["never"], timedelta(seconds=1.5)), seconds=0.1)
board.posted("doing")
assert not asked  # while it has not answered


class Last:
    def __del__(self, sleep=time.sleep):
        sleep(2)  # an interpreter that takes its time to end


sys.modules["last"] = Last()
"""


def test_an_interpreter_that_ends_does_not_abort_for_a_store_that_is_slow() -> None:
    """By Python 3.13: later ones let such a thread hang instead."""
    command = [sys.executable, "-c", ENDS_WHILE_A_STORE_IS_ASKED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
