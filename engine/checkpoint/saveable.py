"""Finds what a checkpoint could not hold, by types alone, before anything is lost by it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import tree
from engine.errors import UserError


def check_saveable(state: dict[str, Any]) -> None:
    """Raise UserError, naming its path, for a value that cannot be saved. No tensor is read or copied."""
    tensors: dict[str, Tensor] = {}
    try:
        tree.flatten(state, tensors)
    except RecursionError:
        raise UserError(
            "the state of a callback, a stream or the LR scheduler contains itself: expected a tree."
        ) from None
    for path, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and not tensor.is_quantized
        if not is_dense or not _has_dtype(tensor.dtype):
            kind = f"{tensor.layout} ".removeprefix("torch.") if tensor.layout != torch.strided else ""
            raise UserError(
                f"{path} is a {kind}{tensor.dtype} tensor, which a checkpoint cannot hold: expected a dense tensor of "
                "another dtype. Use .to_dense(), .int_repr() or torch.view_as_real(), or, for a buffer that never "
                "changes, persistent=False."
            )


@cache
def _has_dtype(dtype: torch.dtype) -> bool:
    """Whether safetensors can hold tensors of `dtype`."""
    from safetensors.torch import save

    try:
        save({"x": torch.empty(1, dtype=dtype)})
    except Exception:
        return False
    return True
