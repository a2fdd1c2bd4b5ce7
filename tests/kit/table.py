"""The sizes of the table of exact runs: windows that divide, that do not, and that hold one sample."""

from __future__ import annotations

import torch

from tests.kit.reference import Regression, big_batch_run, in_order

N = 4


EPOCHS = 3


TAILS = {
    "divides": lambda window: 3 * window,
    "short": lambda window: 2 * window + window // 2 + 1,  # ragged, and for large windows processes without data
    "one": lambda window: 2 * window + 1,  # one sample for all processes together
}


def expected(samples: int, effective_batch: int) -> torch.Tensor:
    return big_batch_run(Regression(samples), [in_order(samples, effective_batch)] * EPOCHS)
