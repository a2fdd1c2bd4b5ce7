"""An optimizer whose step is one of torch's fused kernels, where the task has left that open."""

from __future__ import annotations

from torch import Tensor
from torch.optim import SGD, Adam, Optimizer


def fuse(optimizer: Optimizer) -> None:
    """Let each step go over all parameters at once, in torch's fused kernel: `fused=True`, said for the task.

    Raises ValueError where there is no such kernel, and where the task has said how to step.
    """
    if not isinstance(optimizer, SGD | Adam):  # AdamW is one; Adagrad's knows the CPU only
        raise ValueError(
            f"fused_optimizer=True: {type(optimizer).__name__} has no fused step. Use SGD, Adam or AdamW, or leave "
            "fused_optimizer out."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, SGD) and any(type(parameter.data) is not Tensor for parameter in parameters):
        raise ValueError(
            "fused_optimizer=True: torch's fused SGD knows no DTensor, which fsdp makes of parameters. Use Adam or "
            "AdamW, or leave fused_optimizer out."
        )
    for group in optimizer.param_groups:
        foreach, fused = group["foreach"], group["fused"]
        if foreach is not None or fused is False:
            raise ValueError(
                f"fused_optimizer=True, but configure_optimizer() says foreach={foreach}, fused={fused}: "
                "leave them out there, or fused_optimizer here."
            )
        group["fused"] = True
    optimizer.defaults["fused"] = True  # of groups that are added later
