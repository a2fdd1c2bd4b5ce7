"""Faults of engine/report."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "plot what never changes",
        "engine.report.page:_data",
        "or not is_constant(values)",
        "or len(values)",
        "tests/output/test_report.py -k never_changes",
    ),
    Fault(
        "name only the processes of the last start",
        "engine.report.facts:facts",
        "_stages(processes) or begin",
        "begin",
        "tests/output/test_report.py -k processes_are_those",
    ),
    Fault(
        "give a row to what took no time",
        "engine.report.page:_split",
        "if seconds >= LEAST * total",
        "if total",
        "tests/output/test_report.py -k took_no_time",
    ),
    Fault(
        "take infinity for a number",
        "engine.report.reading:number",
        "abs(value) <= 1e300",
        "value == value",
        "tests/output/test_report.py -k odd_numbers",
    ),
]
