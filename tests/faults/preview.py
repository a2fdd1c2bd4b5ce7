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
    Fault("plan the learning rate one update late", "planned_updates", "lrs[number],", "lrs[number - 1],", PREVIEW),
    Fault(
        "take the micro-batches of a full window for those of the last",
        "forecasts",
        "micro_batches += count * pieces(size)",
        "micro_batches += count * pieces(stage.effective_batch)",
        "tests/plan/test_plan.py::test_stretches_and_forecasts_are_sums_of_all_windows",
    ),
]
