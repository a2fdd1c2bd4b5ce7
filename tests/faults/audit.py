"""Faults of the audit: verdicts that are wrong, and records that are not of the update."""

from tests.faults.fault import Fault

VERDICTS = "tests/audit/test_verdicts.py"

FAULTS = [
    Fault(
        "audit: take one process's samples for the whole batch",
        "engine.audit.classify:_one_batch",
        "[one for own in window for one in own]",
        "window[0]",
        f"{VERDICTS}::test_rounding_has_no_name",
    ),
    Fault(
        "audit: name the first of two faults",
        "_Judge.found",
        "if verdict == EXACT else UNNAMED\n        found.verdict",
        "if verdict == EXACT else verdict\n        found.verdict",
        f"{VERDICTS}::test_two_faults_at_once_have_no_name",
    ),
    Fault(
        "audit: take the gradient before the closure",
        "recorded",
        "if closure is None:",
        "if True:",
        f"{VERDICTS}::test_a_loop_of_another_shape",
    ),
    Fault(
        "audit: count a forward that is only looked at",
        "recorded",
        " if place in used or rows not in trained]",
        "]",
        f"{VERDICTS}::test_a_loop_of_another_shape",
    ),
    Fault(
        "audit: overlook a reduction for each micro-batch",
        "_Judge.found",
        "if several and all(",
        "if not several and all(",
        f"'{VERDICTS}::test_each_fault_is_named[reduced at each micro-batch]'",
    ),
]
