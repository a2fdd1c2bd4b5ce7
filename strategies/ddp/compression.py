"""Communication hooks of DDP: gradients are sent in float16 or bfloat16. Both are approximations."""

# DDP compares a hook's annotations with types, so they must not be texts: no `from __future__ import annotations`.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed has it, without types

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EXACT_TO = {"fp16": 1e-2, "bf16": 1e-1}
"""Largest relative difference of an update from that of one big batch, by the hook's name."""


def cast_and_reduce(dtype: torch.dtype, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Start the reduction of a bucket, in `dtype`, to the mean over the processes. DDP calls it once per bucket."""
    # torch's own hooks cast first and then divide, which overflows at a P-th of the value and rounds twice
    buffer = bucket.buffer()
    narrow = buffer.div_(dist.get_world_size()).to(dtype)

    def receive(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return buffer.copy_(future.value()[0])

    reduction: torch.futures.Future[Any] = dist.all_reduce(narrow, async_op=True).get_future()
    return reduction.then(receive)
