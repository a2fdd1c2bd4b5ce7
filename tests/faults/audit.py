"""Faults of the audit: verdicts that are wrong, and records that are not of the update."""

from tests.faults.fault import Fault

VERDICTS = "tests/audit/test_verdicts.py"
VARIANT = "tests/audit/test_variants.py::test_a_variant_has_the_verdict_that_is_true"

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
        "if at in live or row not in trained",
        "",
        f"{VERDICTS}::test_a_loop_of_another_shape",
    ),
    Fault(
        "audit: overlook a reduction for each micro-batch",
        "_Judge.found",
        "if several and min(",
        "if not several and min(",
        f"'{VERDICTS}::test_each_fault_is_named[reduced at each micro-batch]'",
    ),
    Fault(
        "audit: take two passes of a sample for two samples",
        "engine.audit.classify:judge",
        "found if found.error <= LIMITS[dtype] else as_seen",
        "as_seen",
        f"'{VARIANT}[two_passes_of_each]'",
    ),
    Fault(
        "audit: count a masked sample",
        "recorded",
        "live.update(gradient.nonzero()[:, 0].tolist())",
        "live.update(range(len(gradient)))",
        f"'{VARIANT}[masked_copies_for_what_is_missing]'",
    ),
    Fault(
        "audit: take a second optimizer's step for an update",
        "recorded",
        "optimizer not in stepped",
        "False",
        f"'{VARIANT}[two_optimizers]'",
    ),
    Fault(
        "audit: take logged vectors for gradients",
        "_Judge.found",
        ">= size > max(",
        ">= size >= 0 * max(",
        f"'{VARIANT}[logs_reduced_at_each_micro_batch]'",
    ),
    Fault(
        "audit: find a carried tail in windows of any length",
        "_Judge._misplaced",
        "counts in ({(self.K, self.K)}, {(self.K, epoch)})",
        "True",
        f"'{VARIANT}[windows_of_k_plus_1]'",
    ),
    Fault(
        "audit: call a tail carried that nobody read",
        "_Judge._misplaced",
        "has_tail and keeps_tail and {",
        "has_tail and {",
        f"'{VARIANT}[the_first_tail_unread]'",
    ),
    Fault(
        "audit: let a resumed run forget the parameters",
        "engine.audit.classify:judge",
        "torch.equal(run[0][0].parameters, first)",
        "False",
        f"'{VARIANT}[a_resume_that_forgets_the_parameters]'",
    ),
]
