"""A banner before the run and progress while it runs: live in a terminal, plain lines elsewhere, on process 0."""

from __future__ import annotations

import math
import resource
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, cast

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from engine.callbacks.banner import banner
from engine.callbacks.base import Callback
from engine.callbacks.pace import Pace
from engine.output import Output

if TYPE_CHECKING:
    from engine.trainer import Trainer


class Progress(Callback):
    """Prints a banner, and progress: a few live lines in a terminal, else a line at most every `seconds`.

    `metrics` are names of what the task logs, to be shown too. Between these an update costs one look at the clock.
    `NO_COLOR` and `TERM=dumb` are heeded.
    """

    def __init__(self, seconds: float = 5.0, metrics: Sequence[str] = ()) -> None:
        self._seconds, self._metrics = seconds, metrics
        self._due = math.inf
        self._pace = Pace()
        self._live: Live | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        self._due, self._live = math.inf, None
        if trainer.strategy.rank != 0:
            return
        _say(banner(trainer))
        self._console = Console(file=cast(TextIO, Output(sys.stdout)), highlight=False, markup=False)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._every = 0.25 if self._live else self._seconds
        self._restart(trainer)

    def on_update_end(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        if now < self._due:
            return
        self._due = now + self._every
        self._pace.see(trainer, now)
        if self._live is not None:
            self._live.update(_picture(trainer, self._pace, self._metrics, self._console.width), refresh=True)
        else:
            left = self._pace.left(trainer)
            here = [
                f"epoch {trainer.epoch}",
                f"update {_position(trainer)}",
                *_details(trainer, self._pace, self._metrics),
            ]
            _say("  ".join([*here, *([f"{left} left"] if left is not None else [])]))

    @contextmanager
    def around_validation(self, trainer: Trainer) -> Iterator[None]:
        if self._due < math.inf:
            self._pace.see(trainer, time.perf_counter())
        yield

    def on_validation_end(self, trainer: Trainer) -> None:
        if self._due == math.inf:
            return
        single = {name: value for name, value in trainer.metrics.items() if not name.rpartition("/")[2].isdecimal()}
        means = "  ".join(f"{name} {value:.4g}" for name, value in single.items())  # no cells of a matrix
        rate, _ = self._pace.rates()
        here = f"epoch {trainer.epoch}  update {_position(trainer)}  loss {trainer.record['loss']:.4f}"
        line = f"{here}  |  validation: {means}" + (f"  |  {rate:,.0f} samples/s" if rate else "")
        if self._live is not None:
            self._console.print(line)
        else:
            _say(line)
        self._restart(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._due < math.inf:
            self._close()
            skipped = f", {trainer.skipped} of them skipped" if trainer.skipped else ""
            where = f": {trainer.run_folder.shown}" if trainer.run_folder is not None else ""
            _say(f"done: {trainer.update} updates{skipped}, {trainer.samples} samples{where}")
            if trainer.sees_reduction:
                unknown = "the cost of the reduction is unknown: measuring it takes full windows of K >= 2"
                _say(str(trainer.reduction_cost or unknown))

    def on_interruption(self, trainer: Trainer) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        self._close()

    def _restart(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self._due = now + self._every
        self._pace.restart(trainer, now)

    def _close(self) -> None:
        self._due = math.inf
        if self._live is not None:
            self._live.stop()
            self._live = None


def _say(text: str) -> None:
    print(text, file=Output(sys.stdout), flush=True)


def _picture(trainer: Trainer, pace: Pace, metrics: Sequence[str], width: int) -> Group:
    """Return a line with epoch, bar and time left; below it the details, in as many lines as they need."""
    left, total = pace.left(trainer), trainer.total_updates
    columns = Column(no_wrap=True, style="bold"), Column(ratio=1), Column(no_wrap=True)
    head = Table.grid(*columns, padding=(0, 1), expand=True)
    bar = ProgressBar(total=total, completed=trainer.update, pulse=total is None, complete_style="cyan")
    head.add_row(f"epoch {trainer.epoch}", bar, _position(trainer) + (f"  {left} left" if left is not None else ""))
    space = "\N{NO-BREAK SPACE}"
    unbroken = "  ".join(detail.replace(" ", space) for detail in _details(trainer, pace, metrics))
    lines = textwrap.wrap(unbroken, width, break_on_hyphens=False)
    return Group(head, *(Text(line.replace(space, " "), no_wrap=True) for line in lines))


def _details(trainer: Trainer, pace: Pace, metrics: Sequence[str]) -> list[str]:
    record, (samples, weight) = trainer.record, pace.rates()
    details = [
        f"loss {record['loss']:.4f}",
        *(f"{name} {record[name]:.4g}" for name in metrics if name in record),
        f"grad norm {record['grad_norm']:.3g}",
        f"lr {record['lr']:.3g}",
        f"K {record['accumulate_grad_batches']}",
        f"batch {record['effective_batch']:,}",
        f"{samples:,.0f} samples/s",
    ]
    if not math.isclose(samples, weight):
        details.append(f"{weight:,.0f} weight/s")
    details.append(f"{_peak_memory(trainer) / 2**20:,.0f} MiB")
    if record["skipped"]:
        details.append(f"{record['skipped']} skipped")
    slow = pace.slow_process()
    return [*details, slow] if slow else details


def _position(trainer: Trainer) -> str:
    total = trainer.total_updates
    return f"{trainer.update}" if total is None else f"{trainer.update}/{total}"


def _peak_memory(trainer: Trainer) -> int:
    """Return the most bytes that this process has held so far: on its GPU if it has one, else on the host."""
    device = trainer.strategy.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
