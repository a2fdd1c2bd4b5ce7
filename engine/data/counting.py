"""The number of samples in a micro-batch, as far as it is known, and whether two processes read the same ones."""

import hashlib
import zlib
from collections.abc import Sequence
from inspect import ismethod
from typing import Any

import torch

from engine.data.prefetch import Moving
from engine.errors import UserError
from engine.task import Batching, Task, tensors

INFORMATION = 32  # compressed bytes from which on two equal micro-batches are no coincidence
SAMPLED = 1 << 16  # bytes at each end of a micro-batch that are compressed for that


def overrides(batching: Batching, method: str) -> bool:
    """Whether a task has a method of its own, by its class or set on the object."""
    return getattr(getattr(batching, method), "__func__", None) is not getattr(Batching, method)


def counts_terms(task: Task) -> bool:
    """Whether a task counts the weights of several terms before each window."""
    return ismethod(task.weights) and task.weights.__func__ is not Task.weights  # or an attribute of that name


def size_problem(batching: Batching, batch: Any, planned: int | None = None) -> str:
    """Return why `batch` cannot weigh a mean; "" if it can: its size is as `planned`, or that of all tensors."""
    if overrides(batching, "batch_size"):
        return ""
    seen = list(dict.fromkeys(size for size, _ in tensors(batch.host if isinstance(batch, Moving) else batch)))
    if seen and (seen[0] == planned if planned is not None else len(seen) == 1):
        return ""
    made = f" made of {planned} samples" if planned is not None else ""
    return (
        f"a micro-batch{made} has {' and '.join(map(str, seen)) or 'no'} rows in its tensors, and the loss or metric "
        f"is a mean over an unknown number of samples. Give {type(batching).__name__} a method "
        "batch_size(self, batch) -> int, or return Loss(sum, weight)."
    )


def digest(batch: Any) -> str:
    """Return a digest of the tensors in `batch`; "" if they hold so little that equal ones may be a coincidence."""
    batch = batch.host if isinstance(batch, Moving) else batch
    parts = []
    for _, tensor in tensors(batch):
        if tensor.layout is torch.strided and not tensor.is_nested:
            whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            parts.append(whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    content = b"".join(parts)
    has_information = len(zlib.compress(content[:SAMPLED] + content[-SAMPLED:])) >= INFORMATION
    return hashlib.sha256(content).hexdigest() if has_information else ""


def check_shares(digests: Sequence[str]) -> None:
    """Raise UserError if two processes have the same micro-batch."""
    for rank, value in enumerate(digests):
        if value and (first := digests.index(value)) < rank:
            raise UserError(
                f"processes {first} and {rank} read the same micro-batches: each sample would be trained on more "
                "than once. Give each process its own part of the stream, or return a map-style dataset, which the "
                "engine shares out."
            )
