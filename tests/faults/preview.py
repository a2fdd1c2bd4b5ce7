"""Faults of engine/preview."""

from tests.faults.fault import Fault
from tests.faults.selections import PREVIEW

FAULTS = [
    Fault(
        "plan nominal windows",
        "stage_forecasts",
        "(s.stop - s.start) * s.epochs",
        "s.updates * stage.effective_batch",
        PREVIEW,
    ),
    Fault("plan the learning rate one update late", "stage_forecasts", "lrs(end - 1)", "lrs(end - 2)", PREVIEW),
    Fault(
        "take the micro-batches of a full window for those of the last",
        "stage_forecasts",
        "micro_batches += count * pieces(size)",
        "micro_batches += count * pieces(stage.effective_batch)",
        "tests/plan/test_plan.py::test_stretches_and_forecasts_are_sums_of_all_windows",
    ),
]
