"""A reduction that a failed backward has left unfinished: NaN is sent in place of what it has not sent."""

import math
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class SentBuckets:
    """Counts the buckets that this process has sent in a window, each of which is one collective if `is_exact`."""

    def __init__(self, is_exact: bool) -> None:
        # the reducer's own count is of another window; with NCCL this is untested, and so not supported
        self._is_counted = is_exact and dist.get_backend() == "gloo"
        self._before = 0

    def begin(self) -> None:
        """Count from now on: a backward that is reduced begins."""
        if self._is_counted:
            self._before = _collectives()

    def send_rest(self, ddp: DistributedDataParallel) -> bool:
        """Send NaN in place of the buckets that were not sent, in their order. False if all were sent, or unknown."""
        if not self._is_counted:
            return False
        rest = ddp.reducer._get_zeros_like_grad_buckets()[_collectives() - self._before :]
        for bucket in rest:
            bucket.buffer().fill_(math.nan)
            ddp.reducer._run_comm_hook(bucket).wait()
        if rest and ddp.find_unused_parameters:
            dist.all_reduce(ddp.reducer._get_local_used_map())
        return bool(rest)


def _collectives() -> int:
    """Return the number of collectives that the group of the gradients has begun on this process."""
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())
