"""Faults of engine/plan."""

from tests.faults.fault import Fault
from tests.faults.selections import COUNTS, TABLE

FAULTS = [
    Fault(
        "the boundary one micro-batch late",
        "PlannedWindow.micro_batches",
        "piece + P >= pieces",
        "piece + P > pieces",
        COUNTS,
    ),
    Fault(
        "the boundary one micro-batch early",
        "PlannedWindow.micro_batches",
        "piece + P >= pieces",
        "piece + 2 * P >= pieces",
        COUNTS,
    ),
    Fault(
        "drop the tail",
        "Plan.windows",
        "            yield PlannedWindow(offset, stop, stage)",
        "            if stop - offset == stage.effective_batch:\n"
        "                yield PlannedWindow(offset, stop, stage)",
        TABLE,
    ),
    Fault(
        "cut micro-batches by P",
        "PlannedWindow.micro_batches",
        "piece * N, min((piece + 1) * N,",
        "piece * N, min((piece + 1) * N + P - 1,",
        TABLE,
    ),
    Fault(
        "spread a window unevenly",
        "PlannedWindow.count",
        "min(self.samples, -(-pieces // P) * P) if spread else pieces",
        "pieces",
        "tests/plan/test_plan.py::test_every_sample_is_in_one_micro_batch_of_one_process",
    ),
    Fault(
        "count one update too few",
        "Plan.stretches",
        "windows = -(-(samples - offset) // B)",
        "windows = max((samples - offset) // B, 1)",
        "tests/plan/test_plan.py::test_all_windows_are_those_of_each_epoch",
    ),
    Fault(
        "change K one epoch late",
        "Schedule.index",
        "bisect_right(self.firsts, place)",
        "bisect_right(self.firsts, place - 1)",
        "tests/plan/test_plan.py::test_K_is_that_of_the_last_key_that_was_reached",
    ),
    Fault(
        "the same window asked for with another K is another run",
        "engine.plan.schedule:differences",
        'here["schedule"] != saved["schedule"]',
        "True",
        "tests/resume/test_resume.py -k window_of",
    ),
    Fault(
        "any window is the same run",
        "engine.plan.schedule:differences",
        'here["schedule"] != saved["schedule"]',
        "False",
        "tests/resume/test_resume.py -k window_of",
    ),
    Fault(
        "count an epoch that ends in another stage as whole",
        "Plan.stretches",
        "-(-(left - (windows - 1) * B) // samples)",
        "-(-left // samples)",
        "tests/plan/test_plan.py::test_stretches_and_forecasts_are_sums_of_all_windows",
    ),
]
