"""Faults of engine/preview."""

from tests.faults.fault import Fault
from tests.faults.selections import PREVIEW

FAULTS = [
    Fault(
        "plan nominal windows",
        "planned_updates",
        "before[window.stop] - before[window.start], window",
        "window.stage.effective_batch, window",
        PREVIEW,
    ),
    Fault("plan the learning rate one update late", "planned_updates", "lrs[number] *", "lrs[number - 1] *", PREVIEW),
]
