"""The 2-norm of gradients."""

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

FEW, SMALL = 16, 256
"""On a CPU, more than FEW gradients of at most SMALL elements share a norm: one for each costs more than the copy."""


def norm_of(gradients: list[Tensor], is_on_cpu: bool) -> Tensor:
    """Return the 2-norm (0-dim) of all elements of `gradients`, of which there is at least one."""
    if gradients[FEW:] and is_on_cpu:
        small = [gradient for gradient in gradients if gradient.numel() <= SMALL]
        if small[FEW:]:
            large = [gradient for gradient in gradients if gradient.numel() > SMALL]
            with torch.inference_mode():  # views without version counters: a third of the time
                gradients = [_flatten_dense_tensors(small), *large]  # type: ignore[no-untyped-call]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
