"""Verdicts on loops of other shapes, written before the audit was read: none has a name that is not true of it."""

from __future__ import annotations

import pytest
import torch

from engine.audit import Adapter, audit
from tests.kit.variant_loops import VARIANTS

EVERYDAY = (
    "two_optimizers",
    "two_passes_of_each",
    "masked_copies_for_what_is_missing",
    "logs_reduced_at_each_micro_batch",
    "windows_of_k_plus_1",
    "the_first_tail_unread",
    "a_resume_that_forgets_the_parameters",
)


def check(name: str, P: int, dtype: torch.dtype = torch.float64) -> None:
    loop, case, verdict = VARIANTS[name]
    report = audit(Adapter(loop, cases=[case]), P, dtype=dtype)
    assert report.verdicts == {case: verdict}, report.text()


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_variant_has_the_verdict_that_is_true(name: str) -> None:
    check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("P", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_on_more_processes_and_in_float32(name: str, P: int, dtype: torch.dtype) -> None:
    check(name, P, dtype)
