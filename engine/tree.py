"""Nested state as JSON and tensors, and back: nothing that is read is imported, called or executed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

TENSOR, PAIRS, TUPLE, FLOAT = "$tensor", "$pairs", "$tuple", "$float"
"""Marks of what JSON cannot say: a tensor, a dictionary whose keys are no plain texts, a tuple, nan and inf."""


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return `value` as JSON values, its tensors moved to `tensors` under their path.

    Raises ValueError, naming the path, for anything but dictionaries, lists, tuples, texts, numbers, bools, None and
    tensors.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT: repr(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): flatten(item, tensors, _join(path, key)) for key, item in value.items()}
        pairs = [[flatten(k, tensors, path), flatten(v, tensors, _join(path, k))] for k, v in value.items()]
        return {PAIRS: pairs}
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, _join(path, number)) for number, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    raise ValueError(
        f"the state {path or 'of'!r} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds "
        "dictionaries, lists, tuples, texts, numbers and tensors only."
    )


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `flatten` was given. Raises ValueError or KeyError for what it cannot have returned."""
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
        if mark == FLOAT:
            return float(content)
    return {key: restore(item, tensors) for key, item in value.items()}


def dumps(value: Any) -> str:
    """Return JSON that holds every float to the bit."""
    return json.dumps(value, allow_nan=False, indent=1)


def _join(path: str, part: object) -> str:
    return f"{path}.{part}" if path else str(part)
