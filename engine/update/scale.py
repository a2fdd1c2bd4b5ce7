"""The scale of gradients: what backward multiplies a sum of losses by, and what corrects that at the boundary.

A gradient is (sum of losses) / (sum of weights). The sum of weights is known only at the end of the window. So backward
scales by 1 / unit, a unit that all processes share, and the boundary corrects by unit / weight. For losses weighted by
samples the unit is that very weight, and the correction is 1.
"""

import math
from typing import Any

from engine.data.window import Window

GROWTH_INTERVAL = 2000
"""The updates without an overflow after which float16's loss scale is doubled: as in `torch.amp.GradScaler`."""


class Scale:
    """The unit of a window, and float16's loss scale; both go into one factor per update."""

    def __init__(self, precision: str | None) -> None:
        self._is_fp16 = precision == "fp16"
        self.is_final = False  # whether the gradient needs no division: that of a window's loss
        self._loss_scale, self._quiet_updates = 2.0**16 if self._is_fp16 else 1.0, 0
        self._late_weight = 0.0  # the weight of the update before, if it was not the number of samples
        self._expected = self._unit = 1.0

    def begin(self, window: Window) -> float:
        """Choose the unit of a window and return what backward multiplies a sum of losses by."""
        self._expected = float(window.samples or window.stage.effective_batch)
        if self.is_final:
            return self._loss_scale
        self._unit = 2.0 ** round(math.log2(self._late_weight)) if self._late_weight else self._expected
        return self._loss_scale / self._unit

    def factor(self, weight: float) -> float:
        """Return what makes the summed gradients those of a mean over `weight`."""
        correction = self._unit / weight if weight and not self.is_final else 1.0
        return correction / self._loss_scale

    def end(self, weight: float, overflowed: bool) -> None:
        """Learn from an update. An overflow halves float16's loss scale; many updates without one double it."""
        if self._is_fp16:
            self._quiet_updates = 0 if overflowed else self._quiet_updates + 1
            if overflowed:
                self._loss_scale = max(self._loss_scale / 2, 2.0**-14)
            elif self._quiet_updates == GROWTH_INTERVAL:
                self._loss_scale, self._quiet_updates = self._loss_scale * 2, 0
        if weight:
            self._late_weight = weight if weight != self._expected else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what the next update needs of those before."""
        return {"late_weight": self._late_weight, "loss_scale": [self._loss_scale, self._quiet_updates]}

    def load_state_dict(self, state: dict[str, Any], has_same_precision: bool) -> None:
        """Load what `state_dict` returned; a loss scale only if the precision is the same."""
        self._late_weight = float(state["late_weight"])
        if self._is_fp16 and has_same_precision:
            self._loss_scale, self._quiet_updates = state["loss_scale"]
