"""Nested state as JSON and tensors, and back: nothing that is read is imported, called or executed."""

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from engine.errors import UserError

# Marks of what JSON lacks: a tensor, a dictionary whose keys are not plain texts, a Counter, a tuple, nan, inf
TENSOR, PAIRS, COUNTER, TUPLE, FLOAT = "$tensor", "$pairs", "$counter", "$tuple", "$float"


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return `value` as JSON values, its tensors moved to `tensors` under their path.

    Raises UserError, with the path, except for dictionaries, lists, tuples, texts, numbers, bools, None and tensors.
    """
    if isinstance(value, Tensor):
        while path in tensors:  # {"a": {"b": ...}, "a.b": ...}
            path += "'"
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {FLOAT: repr(float(value))}
    if isinstance(value, Mapping):
        if not isinstance(value, Counter) and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str.__str__(key): flatten(item, tensors, _join(path, key)) for key, item in value.items()}
        pairs = [[flatten(k, tensors, path), flatten(v, tensors, _join(path, k))] for k, v in value.items()]
        return {COUNTER if isinstance(value, Counter) else PAIRS: pairs}
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, _join(path, number)) for number, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    raise UserError(
        f"the state {path or 'itself'!r} is a {type(value).__module__}.{type(value).__qualname__}: expected "
        "dictionaries, lists, tuples, texts, numbers and tensors."
    )


def check_saveable(state: Mapping[str, Any]) -> None:
    """Raise UserError, naming its path, for a value that cannot be saved. No tensor is read or copied."""
    tensors: dict[str, Tensor] = {}
    try:
        flatten(state, tensors)
    except RecursionError:
        raise UserError("the state of a callback, stream or LR scheduler contains itself: expected a tree.") from None
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


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `flatten` was given. Raises UserError or KeyError for what it cannot have returned."""
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, content),) = value.items()
        if mark == TENSOR:
            return tensors[content]
        if mark == TUPLE:
            return tuple(restore(item, tensors) for item in content)
        if mark == PAIRS:
            return {restore(key, tensors): restore(item, tensors) for key, item in content}
        if mark == COUNTER:  # as MultiStepLR keeps its milestones
            return Counter({restore(key, tensors): restore(item, tensors) for key, item in content})
        if mark == FLOAT:
            return float(content)
    return {key: restore(item, tensors) for key, item in value.items()}


def copied(value: Any) -> Any:
    """Return a copy of `value` on the CPU, which shares nothing with it. Raises UserError as `flatten` does."""
    tensors: dict[str, Tensor] = {}
    plain = flatten(value, tensors)
    return restore(plain, {path: t.detach().to("cpu", copy=True).contiguous() for path, t in tensors.items()})


def _join(path: str, part: object) -> str:
    return f"{path}.{part}" if path else str(part)
