"""The bits of a tensor, to compare replicas exactly."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(values: Tensor) -> Tensor:
    """Return the sum of a tensor's elements, each read as an integer of its size (0-dim, int64)."""
    values = values.contiguous()
    flat = (torch.view_as_real(values) if values.is_complex() else values).view(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
