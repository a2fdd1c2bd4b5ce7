"""The limits of FSDP, raised as errors before the first update."""

from __future__ import annotations

from strategies.errors import UserError
from strategies.torch_internals import is_freed_storage


def check_double_backward(error: Exception) -> None:
    """Raise UserError if `error` comes from a gradient of a gradient."""
    if is_freed_storage(error):
        raise UserError(
            "the loss has a gradient of a gradient (create_graph=True), which FSDP cannot compute: it frees parameters "
            "after the first backward. Use strategy 'ddp'."
        ) from error
