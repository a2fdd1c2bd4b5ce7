"""Traces of a few updates, by torch's profiler."""

from contextlib import ExitStack

from torch.profiler import profile, record_function

from engine.callbacks.base import Callback, Trainer
from engine.errors import UserError


class Profiler(Callback):
    """Traces the updates `first` to `last` (from 1) on process 0 into `trace-FIRST-LAST.json` in the run_dir.

    The file is a Chrome trace, for https://ui.perfetto.dev; each update is a span of that name. Leave out the first few
    updates, which are slow, and take few. Raises UserError for invalid numbers, and without a `run_dir`.
    """

    def __init__(self, first: int = 10, last: int = 12) -> None:
        if not 1 <= first <= last:
            raise UserError(f"Profiler(first={first!r}, last={last!r}): give 1 <= first <= last.")
        self._first, self._last = first, last
        self._profile: profile | None = None
        self._span = ExitStack()  # that of the current update

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.settings.run_dir is None:
            raise UserError("Profiler writes into the run's folder: give a run_dir.")
        self.on_update_end(trainer)

    def on_update_end(self, trainer: Trainer) -> None:
        self._span.close()
        if self._profile is None:
            if trainer.run_folder is None or trainer.update != self._first - 1:
                return
            self._profile = profile()
            self._profile.start()
        if trainer.update in (self._last, trainer.total_updates):
            self.on_fit_end(trainer)
        else:
            self._span.enter_context(record_function(f"update {trainer.update + 1}"))

    def on_fit_end(self, trainer: Trainer) -> None:
        self._span.close()
        if self._profile is not None and trainer.run_folder is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(trainer.run_folder.pinned / f"trace-{self._first}-{self._last}.json"))
            self._profile = None

    on_interruption = on_fit_end

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        """End early; there may be nothing to write to."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
