"""The gradient noise scale: its estimate, a jackknife interval, and what it says of the batch. Imports no torch.

Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv:1812.06162, for unequal weights.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

log = logging.getLogger("tally")

NORMS, WEIGHTS = "noise scale: squared norms", "noise scale: weights"
"""The names under which the message has (Q, V) and (V2, V)."""
FIELDS = ("noise_scale", "noise_scale_low", "noise_scale_high")
KEPT = 50  # the measured updates that are averaged: the last ones
UNKNOWN = dict.fromkeys(FIELDS, math.nan)
FREE = 0.1
"""The share of the noise scale up to which a batch costs at most a tenth more samples than the smallest would."""


def moments(Q: float, V: float, V2: float, T: float, W: float) -> tuple[float, float]:
    """Return unbiased (|G|^2, tr S) of one update; needs 0 < V < W.

    Of each process, before its last micro-batch: u is the gradient of the sum of losses, w its weight. Q, V and V2 are
    the sums of |u|^2, w and w^2. T is |the whole sum's gradient|^2, W its weight. tr S is per unit of weight.
    """
    return (T * V - Q * W) / (V * W**2 - W * V2), (Q * W**2 - T * V2) / (V * W**2 - W * V2)


def ratio(noise: Sequence[float], signal: Sequence[float]) -> tuple[float, float, float]:
    """Return the noise scale of W tr S and W |G|^2 by update, and its 95 % interval, by jackknife over the updates.

    It is 0 without noise, and infinity without a signal. The jackknife takes the angle whose tangent is the ratio,
    which stays bounded if one of the two averages is nearly 0.
    """
    N, D, atan2 = sum(noise), sum(signal), math.atan2
    scale = _deviation(noise) / (_deviation(signal) or math.nan)  # one update, or equal ones, give no interval
    without = [atan2(N - n, (D - d) * scale) for n, d in zip(noise, signal, strict=True)]
    margin = 1.96 * math.sqrt(len(noise) - 1) * _deviation(without)
    angle = atan2(N, D * scale)
    return _tangent(atan2(N, D)), scale * _tangent(angle - margin), scale * _tangent(angle + margin)


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of `values`, which are the whole population."""
    n = len(values)
    return math.dist(values, [sum(values) / n] * n) / math.sqrt(n)


def _tangent(angle: float) -> float:
    """Return the tangent of an angle from 0 to a right one, or of the nearest such."""
    return 0.0 if angle <= 0 else math.inf if angle >= math.pi / 2 else math.tan(angle)


class NoiseMeter:
    """Averages |G|^2 and tr S apart over the last measured updates, each with the weight of its update."""

    def __init__(self, every: int, speaks: bool) -> None:
        self.every, self._speaks = every, speaks
        self.is_due = False  # whether the current update is measured
        self._noise: deque[float] = deque(maxlen=KEPT)  # W tr S of each measured update
        self._signal: deque[float] = deque(maxlen=KEPT)  # W |G|^2
        self._estimate = UNKNOWN

    def see(self, metrics: dict[str, float], norm: float, weight: float, K: int, scale: float) -> dict[str, float]:
        """Replace the sums in an update's metrics by the noise scale.

        `norm` is that before clipping; `scale` is what backward has multiplied the sums of losses by.
        """
        if not self.is_due:
            return metrics | (self._estimate if K > 1 else UNKNOWN)
        square, group = metrics.pop(NORMS, math.nan), metrics.pop(WEIGHTS, math.nan)
        if weight - group > 1e-9 * weight and math.isfinite(square + norm):
            signal, noise = moments(square / scale**2, 1.0, group, (norm * weight) ** 2, weight)
            self._noise.append(weight * noise)
            self._signal.append(weight * signal)
            self._estimate = self._estimated()
        elif self._speaks and (K == 1 or not self._noise):
            self._speaks = False
            log.warning(
                "noise_scale is unknown: it takes K >= 2, gradients that stay on their process until the last "
                "micro-batch (single, dp, ddp), and a loss of each micro-batch."
            )
        return metrics | (self._estimate if K > 1 else UNKNOWN)

    def _estimated(self) -> dict[str, float]:
        return dict(zip(FIELDS, ratio(self._noise, self._signal), strict=True))

    def state_dict(self) -> list[Any]:
        """Return what the next estimate needs."""
        return [list(pair) for pair in zip(self._noise, self._signal, strict=True)]

    def load_state_dict(self, state: Iterable[Sequence[float]]) -> None:
        """Load what `state_dict` returned."""
        pairs = list(state)
        self._noise, self._signal = (deque((pair[i] for pair in pairs), KEPT) for i in (0, 1))
        self._estimate = self._estimated() if pairs else UNKNOWN


class Advice(NamedTuple):
    """Which batch to use: N, K, and one line that says why."""

    N: int
    K: int
    text: str


def advise(
    estimate: Sequence[float], batch: float, weight_per_sample: float, N: float, K: int, hiding: int | None
) -> Advice | None:
    """Return advice for runs whose updates have `batch` samples in windows of K; None if the noise scale is unknown.

    `estimate` is (noise scale, low, high) in weight. K hides the reduction (`hiding`, None: unknown) as far as the
    batch stays below the noise scale, where an update needs twice the samples that the smallest batch would. Otherwise
    it is the largest that costs at most a tenth more samples.
    """
    value, low, high = estimate
    noise = (low if math.isinf(value) else value) / weight_per_sample  # in samples
    if not 0 < noise < math.inf:
        return None
    unit = "samples" if math.isclose(weight_per_sample, 1.0) else "in weight"
    most = noise / (batch / K)  # the K at which a batch is as large as the noise scale
    best = max(_power(FREE * most), min(hiding or 1, _power(most)))
    size = round(N) if most >= 1 else min(round(N), _power(N * most))
    in_weight = "" if unit == "samples" else f" ({batch * weight_per_sample:,.0f} {unit})"
    parts = [
        f"noise scale {_number(value)} {unit} (95 %: {_number(low)} to {_number(high)})",
        f"effective batch {batch:,.0f}{in_weight}: {_room(noise / batch)}",
        *([f"K={hiding} hides the reduction"] if hiding and hiding > 1 else []),
        f"suggested: N={size} K={best}" if math.isfinite(high) else "nothing suggested: the interval has no upper end",
    ]
    return Advice(size, best, "; ".join(parts))


def _room(times: float) -> str:
    if times >= 2:
        return f"up to {_power(times)} times larger would still pay"
    return "larger would hardly pay" if times > 0.5 else f"{_power(1 / times)} times smaller would need fewer samples"


def _power(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return int(2 ** math.floor(math.log2(max(1.0, value))))


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else "infinity" if math.isinf(value) else f"{float(f'{value:.3g}'):,g}"
