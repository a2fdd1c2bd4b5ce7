"""The limits of FSDP, raised as errors before the first update."""

from __future__ import annotations

from torch.optim import Optimizer

from strategies.errors import UserError
from strategies.torch_internals import is_freed_storage

UNSUPPORTED_OPTIMIZERS = {"Adafactor", "Rprop"}
"""Class names of optimizers whose step fails on shards (torch 2.13), of torch and of other libraries."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise UserError for an optimizer whose step fails on shards."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in UNSUPPORTED_OPTIMIZERS:
            raise UserError(
                f"optimizer={type(optimizer).__name__}: its step does not work on the shards of FSDP. Use another "
                "optimizer, or strategy 'ddp'."
            )


def check_double_backward(error: Exception) -> None:
    """Raise UserError if `error` comes from a gradient of a gradient."""
    if is_freed_storage(error):
        raise UserError(
            "the loss has a gradient of a gradient (create_graph=True), which FSDP cannot compute: it frees parameters "
            "after the first backward. Use strategy 'ddp'."
        ) from error
