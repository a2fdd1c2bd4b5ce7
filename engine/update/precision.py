"""Precision of the forward pass: autocast, and torch's own switches. Gradients stay in float32."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch

from engine.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]


def check_precision(precision: str | None) -> None:
    """Raise UserError for an unknown precision."""
    if precision is not None and precision not in get_args(Precision):
        raise UserError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))} or None.")


def autocast(function: Callable[..., Any], precision: str | None, device_type: str) -> Callable[..., Any]:
    """Return `function` under the autocast of `precision`; `function` itself if nothing is cast."""
    if precision not in ("bf16", "fp16"):
        return function
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device_type, dtype=dtype)(function)  # type: ignore[no-any-return]


@contextmanager
def numerics(deterministic: bool, tf32: bool | None) -> Iterator[None]:
    """Set torch's deterministic and TF32 switches as asked, and restore them afterwards."""
    with ExitStack() as undo:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
            undo.callback(torch.use_deterministic_algorithms, was[0], warn_only=warns)
            undo.callback(setattr, torch.backends.cudnn, "benchmark", was[1])
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if tf32 is not None:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
        yield
