"""Early stopping: ends a run when a validation metric no longer improves."""

from typing import Any

from engine.callbacks.base import Callback, Trainer, check_has_validation
from engine.errors import UserError, check_count
from engine.records.metric import MetricRule


class EarlyStopping(Callback):
    """Ends the run after `patience` validations in a row whose `metric` was not better than the best before.

    `mode` is "min" or "max"; better means by more than `min_delta`; NaN never is. All processes hold the same means, so
    they stop at the same update. Raises UserError for invalid arguments, and for a metric that is missing.
    """

    def __init__(self, metric: str = "loss", patience: int = 3, mode: str = "min", min_delta: float = 0.0) -> None:
        check_count("EarlyStopping.patience", patience)
        if not min_delta >= 0:
            raise UserError(f"EarlyStopping(min_delta={min_delta!r}): expected a number of at least 0.")
        self._rule = MetricRule("EarlyStopping", f"{mode}:{metric}")
        self._patience = patience
        self._least_gain = min_delta if mode == "max" else -min_delta
        self.best: float | None = None
        """The best value so far."""
        self.waited = 0
        """Validations since then."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Stop at once if the resumed run had stopped."""
        check_has_validation(trainer, self)
        if trainer.update == 0:
            self.best, self.waited = None, 0
        self._stop_if_due(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        value = self._rule.value(trainer.metrics)
        if self._rule.improves(value, None if self.best is None else self.best + self._least_gain):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: Trainer) -> None:
        if self.waited >= self._patience:
            trainer.stop(is_collective=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
