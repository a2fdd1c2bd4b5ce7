"""Gradients in fewer bytes: the communication hooks that `DDPStrategy` knows by name. Each is an approximation."""

# DDP compares a hook's annotations with types, so they must not be texts: no `from __future__ import annotations`.

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's, whose types are not told
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

EXACT_TO = {"fp16": 1e-2, "bf16": 1e-1, "powersgd": None}
"""The names, and how near their updates are to those of one big batch (relative); None: they are meant to be others."""

NOT_ZERO = 1e-30
"""Added to a norm, so that a gradient of zeros is not divided by 0."""


class Hook(ABC):
    """Reduces the buckets of one window after the other, and counts what it gives to collectives."""

    keeps_state = False
    """Whether a process keeps something from window to window, which a checkpoint must hold."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int]] = {}

    @abstractmethod
    def reduce(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start the reduction of a bucket to the mean over the processes: what DDP calls, once per bucket."""

    @property
    def reductions(self) -> tuple[int, int]:
        """(collectives, bytes) of the last window, on this process."""
        return sum(count for count, _ in self._sent.values()), sum(size for _, size in self._sent.values())

    def commit(self) -> None:
        """Note that the window's update is made: one that is skipped or dropped leaves nothing behind."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this process keeps from update to update."""
        return {}

    def load_state_dict(self, everyone: list[dict[str, Any]], rank: int, device: torch.device) -> None:
        """Take back what `state_dict` returned on all processes, of whom there may have been another number."""

    def _note(self, bucket: GradBucket, collectives: int, size: int) -> None:
        if bucket.index() == 0:
            self._sent.clear()
        self._sent[bucket.index()] = collectives, size


class CastHook(Hook):
    """Sends float16 or bfloat16.

    The mean is formed before the numbers are made narrow, and in full precision: torch's own hooks cast first and then
    divide, which overflows at a P-th of the value and rounds twice.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def reduce(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start the reduction of a bucket."""
        buffer = bucket.buffer()
        sent = buffer.div_(dist.get_world_size()).to(self._dtype)
        self._note(bucket, 1, sent.nbytes)

        def receive(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            mean: Tensor = future.value()[0]
            return buffer.copy_(mean)

        reduction: torch.futures.Future[Any] = dist.all_reduce(sent, async_op=True).get_future()
        return reduction.then(receive)


class LowRank(Hook):
    """PowerSGD (Vogels et al., 2019): of each matrix it sends two thin ones, and keeps what was lost for the next time.

    What is lost so far is different on each process, and as large as the gradients. Random projections are drawn anew
    for each update, from its number: torch's warm start never gets away from a matrix that was zero once.
    """

    keeps_state = True

    def __init__(self, rank: int, start: int) -> None:
        super().__init__()
        self._state = PowerSGDState(None, rank, 2, warm_start=False, orthogonalization_epsilon=NOT_ZERO)
        self._start = start
        self._updates = 0
        self._lost: dict[int, Tensor] = {}

    def reduce(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket. Raises ValueError where a checkpoint was made with buckets of other sizes."""
        index, size, own = bucket.index(), bucket.buffer().numel(), self._state
        if index == 0:
            own.error_dict = dict(self._lost)
        if index in own.error_dict and own.error_dict[index].numel() != size:
            raise ValueError("the checkpoint was made with other buckets: use the same bucket_cap_mb with powersgd.")
        compresses = self._updates >= self._start
        own.iter = 2 if compresses else 0  # torch's own counter begins to compress at 2
        own.rng = np.random.RandomState((self._updates, index))
        before = own.total_numel_after_compression
        future: torch.futures.Future[Tensor] = powerSGD_hook(own, bucket)
        future.wait()  # its three reductions wait for one another in gloo's two threads: two buckets would block both
        numbers = own.total_numel_after_compression - before if compresses else size
        self._note(bucket, 3 if compresses else 1, numbers * bucket.buffer().element_size())
        return future

    def commit(self) -> None:
        """Keep what the update has lost."""
        self._lost = dict(self._state.error_dict)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and what this process has lost in them, by bucket."""
        return {"updates": self._updates, "lost": {index: lost.cpu() for index, lost in self._lost.items()}}

    def load_state_dict(self, everyone: list[dict[str, Any]], rank: int, device: torch.device) -> None:
        """Take back this process's part; on another number of processes the mean, which is all that matters.

        (The matrices that are sent are linear in the mean of what all processes have; each one's own only rounds.)
        """
        self._updates = int(everyone[0]["updates"])
        if len(everyone) == dist.get_world_size():
            lost = everyone[rank]["lost"]
        else:
            parts = [state["lost"] for state in everyone]
            lost = {index: torch.stack([part[index] for part in parts]).mean(0) for index in parts[0]}
        self._lost = {index: tensor.to(device) for index, tensor in lost.items()}


def make_hook(name: str | None, rank: int, start: int) -> Hook | None:
    """Return the hook of that name; None for None."""
    if name is None:
        return None
    return (
        LowRank(rank, start) if name == "powersgd" else CastHook({"fp16": torch.float16, "bf16": torch.bfloat16}[name])
    )


def check_hook(name: str | None, rank: int, start: int) -> None:
    """Raise ValueError for a hook or an option of it that cannot be."""
    if name is not None and name not in EXACT_TO:
        raise ValueError(
            f"communication_hook={name!r}: choose one of {', '.join(EXACT_TO)}, or None to send gradients whole."
        )
    for option, value, least in (("powersgd_rank", rank, 1), ("powersgd_start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option}={value!r}: give a whole number of at least {least}.")
