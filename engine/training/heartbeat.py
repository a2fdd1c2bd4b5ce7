"""What each process is doing, left where the others can read it: so that a silence has a name.

A thread looks every few seconds at where the main thread is. Nothing is added to the loop itself.
"""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from engine.update.message import ProcessFailureError
from strategies import Strategy

if TYPE_CHECKING:
    from engine.trainer import Trainer

TOPIC, FAILURE = "doing", "failure"

DOINGS = {
    ("engine/data/map_style.py", "_micros"): "fetching {micro}",
    ("engine/data/stream.py", "take"): "reading {micro}",
    ("engine/update/updater.py", "forward"): "computing {micro}",
    ("strategies/base.py", "backward"): "in the backward of {micro}",
    ("engine/update/updater.py", "_agreed"): "waiting for the others' message of update {update}",
    ("engine/update/updater.py", "finish"): "making update {update}",
    ("engine/training/validation.py", "run"): "validating after update {update}",
    ("engine/checkpoint/checkpointer.py", "save"): "saving update {update}",
    ("engine/checkpoint/checkpointer.py", "finish"): "saving update {update}",
    ("engine/trainer.py", "call"): "in a callback after update {update}",
    ("engine/trainer.py", "_build"): "starting",
}
"""What the innermost of these functions means."""


class Watch:
    """While it is entered, tells every `seconds` what this process is doing; only where there are several."""

    def __init__(self, trainer: Trainer, seconds: float = 3.0) -> None:
        self._trainer = trainer
        self._seconds = seconds
        self._main = threading.get_ident()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="tally-watch", daemon=True)
        self._doing, self._since = "", time.time()

    def __enter__(self) -> Watch:
        if self._trainer.strategy.processes > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(4.0)  # more than it waits for a host that is gone

    def _tell(self) -> None:
        while not self._ends.wait(self._seconds):
            doing = self._describe(sys._current_frames().get(self._main))
            if doing != self._doing:
                self._doing, self._since = doing, time.time()
            text = f"{doing} for {time.time() - self._since:.0f} s"
            self._trainer.strategy.post(TOPIC, f"{time.time()} {text}")

    def _describe(self, frame: FrameType | None) -> str:
        trainer = self._trainer
        loop = getattr(trainer, "loop", None)
        micro = (
            f"micro-batch {loop.sums.micro_batches + 1} of update {trainer.update}"
            if loop is not None
            else "a micro-batch"
        )
        while frame is not None:
            code = frame.f_code
            for (file, name), doing in DOINGS.items():
                if code.co_name == name and code.co_filename.endswith(file):
                    return doing.format(micro=micro, update=trainer.update)
            frame = frame.f_back
        return "between two updates"


def lost_contact(strategy: Strategy, where: str, error: BaseException) -> ProcessFailureError:
    """Return the error of a process that waits for another in vain: who failed, or what each was doing last."""
    said = [f"process {rank} failed: {text}" for rank, text in strategy.posted(FAILURE).items()]
    if not said:
        for rank, text in strategy.posted(TOPIC).items():
            at, _, doing = text.partition(" ")
            if rank != strategy.rank:
                said.append(f"process {rank} was last heard of {time.time() - float(at):.0f} s ago, {doing}")
    return ProcessFailureError(f"lost contact with another process {where}. {'; '.join(said)} ({error})".strip())
