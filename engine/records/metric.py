"""The rule that decides which of two validations is better."""

import math
from collections.abc import Mapping

from engine.errors import UserError


class MetricRule:
    """Compares validations by one metric: `"min:loss"` or `"max:accuracy"`. Raises UserError for another rule."""

    def __init__(self, asked_by: str, rule: str) -> None:
        self._asked_by = asked_by
        self.mode, _, self.metric = str(rule).partition(":")
        if self.mode not in ("min", "max") or not self.metric:
            raise UserError(f"{asked_by}={rule!r}: expected min:METRIC or max:METRIC, such as max:accuracy.")

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric that decides. Raises UserError if it is missing."""
        if self.metric not in metrics:
            known = ", ".join(metrics)
            raise UserError(f"{self._asked_by}={self.mode}:{self.metric}: evaluate() returns {known}. Use one.")
        return float(metrics[self.metric])

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far. NaN is not."""
        return not math.isnan(value) and (best is None or (value < best if self.mode == "min" else value > best))
