"""Moves of a batch to a device."""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor


def move(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`: in dicts, lists, tuples, mappings, and by `.to`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    if type(batch) is dict:
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(move(value, device) for value in batch)
    if isinstance(batch, Mapping):
        moved = copy(batch)
        for key, value in batch.items():
            moved[key] = move(value, device)  # type: ignore[index]
        return moved
    return batch
