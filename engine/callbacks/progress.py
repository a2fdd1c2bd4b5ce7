"""A banner before the run and progress while it runs: live in a terminal, plain lines elsewhere, on process 0."""

import math
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from engine.callbacks.banner import banner
from engine.callbacks.base import Callback, Trainer
from engine.callbacks.pace import Pace
from engine.disk import shown
from engine.memory import peak_memory
from engine.output import Output, say

if TYPE_CHECKING:
    from rich.console import Group


class Progress(Callback):
    """Prints a banner, and progress: a few live lines in a terminal, else a line at most every `seconds`.

    `metrics` are names of what the task logs, to be shown too. `NO_COLOR` and `TERM=dumb` are heeded.
    """

    def __init__(self, seconds: float = 5.0, metrics: Sequence[str] = ()) -> None:
        self._seconds, self._metrics = seconds, metrics
        self._due = math.inf
        self._pace = Pace()
        self._live: Any = None  # rich's, which is imported when the run starts

    def on_fit_start(self, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.live import Live

        self._due, self._live = math.inf, None
        if trainer.strategy.rank != 0:
            return
        say(banner(trainer))
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
            details = [*_here(trainer), *_training(trainer, self._metrics), *_machine(trainer, self._pace)]
            say("  ".join([*details, *([f"{left} left"] if left is not None else [])]))

    @contextmanager
    def around_validation(self, trainer: Trainer) -> Iterator[None]:
        if self._due < math.inf:
            self._pace.see(trainer, time.perf_counter())
        yield

    def on_validation_end(self, trainer: Trainer) -> None:
        if self._due == math.inf:
            return
        single = {name: value for name, value in trainer.metrics.items() if not name.rpartition("/")[2].isdecimal()}
        means = [f"{name} {value:#.4g}" for name, value in single.items()]  # no cells of a matrix
        means[:1] = [f"validation: {mean}" for mean in means[:1]]
        details = [*_here(trainer), f"loss {trainer.record['loss']:.4f}", *means]
        if self._live is not None:
            self._console.print("\n".join(_wrap(details, self._console.width, " " * 2)))
        else:
            say("  ".join(details))
        self._restart(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._due < math.inf:
            self._close()
            skipped = f", {trainer.skipped} of them skipped" if trainer.skipped else ""
            where = f": {shown(trainer.run_folder.path)}" if trainer.run_folder is not None else ""
            say(f"done: {trainer.update:,} updates{skipped}, {trainer.samples:,} samples{where}")
            if trainer.sees_reduction:
                unknown = "the cost of the reduction is unknown: measuring it takes full windows of K >= 2"
                say(str(trainer.reduction_cost or unknown))

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


def _picture(trainer: Trainer, pace: Pace, metrics: Sequence[str], width: int) -> "Group":
    """Return a line with epoch, bar and time left; below it the training and the machine, on one line if they fit."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    left, total = pace.left(trainer), trainer.total_updates
    columns = Column(no_wrap=True, style="bold"), Column(ratio=1), Column(no_wrap=True)
    head = Table.grid(*columns, padding=(0, 1), expand=True)
    bar = ProgressBar(total=total, completed=trainer.update, pulse=total is None, complete_style="cyan")
    epoch, update = _here(trainer)
    head.add_row(epoch, bar, update + (f"  {left} left" if left is not None else ""))
    training, machine = _training(trainer, metrics), _machine(trainer, pace)
    fits = len("  ".join([*training, *machine])) <= width
    lines = [line for part in ([training + machine] if fits else [training, machine]) for line in _wrap(part, width)]
    return Group(head, *(Text(line, no_wrap=True) for line in lines))


def _wrap(details: list[str], width: int, indent: str = "") -> list[str]:
    """Return the details in lines, none of them broken; lines after the first begin with `indent`."""
    space = "\N{NO-BREAK SPACE}"
    text = "  ".join(detail.replace(" ", space) for detail in details)
    lines = textwrap.wrap(text, width, break_on_hyphens=False, subsequent_indent=indent)
    return [line.replace(space, " ") for line in lines]


def _training(trainer: Trainer, metrics: Sequence[str]) -> list[str]:
    record = trainer.record
    N = f"N {record['micro_batch_size']} x " if "micro_batch_size" in record else ""
    return [
        f"loss {record['loss']:.4f}",
        *(f"{name} {record[name]:.4g}" for name in metrics if name in record),
        f"grad norm {record['grad_norm']:.3g}",
        f"lr {record['lr']:.3g}",
        f"{N}K {record['accumulate_grad_batches']}",
        f"effective batch {record['effective_batch']:,}",
    ]


def _machine(trainer: Trainer, pace: Pace) -> list[str]:
    (samples, weight), skipped, slow = pace.rates(), trainer.record["skipped"], pace.slow_process(trainer)
    peak = peak_memory(trainer.strategy.device) / 2**20
    return [
        f"{samples:,.0f} samples/s",
        *([] if math.isclose(samples, weight) else [f"{weight:,.0f} weight/s"]),
        f"peak memory {peak:,.0f} MiB",
        *([f"{skipped} skipped"] if skipped else []),
        *([slow] if slow else []),
    ]


def _here(trainer: Trainer) -> list[str]:
    """Return epoch and update, as wide as they will be at the run's end."""
    epochs, total = trainer.settings.max_epochs, trainer.total_updates
    last = "" if epochs is None else str(epochs - 1)
    update = str(trainer.update) if total is None else f"{trainer.update:>{len(str(total))}}/{total}"
    return [f"epoch {trainer.epoch:>{len(last)}}", f"update {update}"]
