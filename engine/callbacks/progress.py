"""A banner before the run and progress while it runs: a bar in a terminal, plain lines elsewhere, on process 0."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.banner import banner
from engine.callbacks.base import Callback

if TYPE_CHECKING:
    from engine.trainer import Trainer


class Progress(Callback):
    """Prints what is about to run, and how it goes; a plain line at most every `seconds` where there is no terminal."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._speaks = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Print the banner."""
        self._speaks = trainer.strategy.rank == 0
        self._samples, self._since, self._told = 0, time.perf_counter(), time.perf_counter()
        if self._speaks:
            print(banner(trainer), flush=True)
            self._bar: Any = tqdm(
                total=trainer.total_updates,
                unit=" updates",
                disable=not sys.stdout.isatty(),
                file=sys.stdout,
                leave=False,
            )

    def on_update_end(self, trainer: Trainer) -> None:
        """Move the bar, or print a line from time to time."""
        if not self._speaks:
            return
        if not self._bar.disable:
            if self._bar.update():
                self._bar.set_postfix_str(_describe(trainer), refresh=False)
        elif time.perf_counter() - self._told > self._seconds:
            self._told = time.perf_counter()
            print(f"update {trainer.update}{_of(trainer.total_updates)}  {_describe(trainer)}", flush=True)

    def on_validation_end(self, trainer: Trainer) -> None:
        """Print the means."""
        if self._speaks:
            rate = (trainer.samples - self._samples) / max(time.perf_counter() - self._since, 1e-9)
            self._samples, self._since = trainer.samples, time.perf_counter()
            means = "  ".join(f"{name} {value:.4g}" for name, value in trainer.metrics.items())
            tqdm.write(
                f"epoch {trainer.epoch}  update {trainer.update}{_of(trainer.total_updates)}  "
                f"loss {trainer.record['loss']:.4f}  |  validation: {means}  |  {rate:,.0f} samples/s",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Say where the run is."""
        if self._speaks:
            self._bar.close()
            skipped = f", {trainer.skipped} of them skipped" if trainer.skipped else ""
            where = f": {trainer.run.path}" if trainer.run is not None else ""
            print(f"done: {trainer.update} updates{skipped}, {trainer.samples} samples{where}", flush=True)

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        """Leave the terminal clean."""
        if self._speaks:
            self._bar.close()


def _describe(trainer: Trainer) -> str:
    record = trainer.record
    skipped = f"  skipped {record['skipped']}" if record["skipped"] else ""
    return (
        f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3g}  lr {record['lr']:.3g}  "
        f"K {record['accumulate_grad_batches']}{skipped}"
    )


def _of(total: int | None) -> str:
    return "" if total is None else f"/{total}"
