"""Steps divided among processes: each keeps the state of its share of whole parameters, and steps that share.

The optimizer stays the object that the user made, with all its groups: an LR scheduler may hold it. Only during a step
its groups leave out the parameters of other processes. `torch.distributed.optim.ZeroRedundancyOptimizer` builds another
optimizer from class and defaults, which fails for AdamW (torch 2.13) and for parameters of several dtypes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from strategies.errors import UserError
from strategies.optimizers import parts_of, with_modes

CHUNK = 25 << 20  # bytes of one broadcast


class OptimizerShards:
    """Divides the steps of `parts` of an optimizer (default: all). Raises UserError for an optimizer with modes."""

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup, parts: Sequence[Optimizer] = ()) -> None:
        parts = parts or parts_of(optimizer)
        held = [p for part in parts for g in part.param_groups for p in g["params"] if p.requires_grad]
        self.held = set(held)  # parameters whose steps are divided
        self._group = group
        self._shares = divide(held, dist.get_world_size(group))
        self.elsewhere = self.held.difference(self._shares[dist.get_rank(group)])
        """Parameters that other processes step."""
        for part in parts:
            if with_modes(part):
                raise UserError(
                    f"{type(part).__name__}: its steps are divided among the processes, but train() and eval() need "
                    "the whole state. Use another optimizer, or DDPStrategy with shard_optimizer=False."
                )
        for parameter in self.elsewhere:  # some optimizers create their state at once
            optimizer.state.pop(parameter, None)
        self._hooks = [optimizer.register_step_pre_hook(self._hide), optimizer.register_step_post_hook(self._send)]
        self._whole_groups: list[list[nn.Parameter]] = []

    def _hide(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._whole_groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in self.elsewhere]

    def _send(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, parameters in zip(optimizer.param_groups, self._whole_groups, strict=True):
            group["params"] = parameters
        for owner, share in enumerate(self._shares):
            if share:
                self._broadcast(share, owner)

    def _broadcast(self, share: list[nn.Parameter], owner: int) -> None:
        tensors = [p.detach().squeeze() for p in share]  # strides of dimensions of 1 fail in torch, if it is one tensor
        dist._broadcast_coalesced(self._group, tensors, CHUNK, owner)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Remove the hooks: the optimizer then steps all parameters again."""
        for hook in self._hooks:
            hook.remove()


def divide(parameters: Iterable[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Return `size` shares of whole parameters, of similar size: the largest first, each to the smallest share."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(size)]
    numbers = [0] * size
    for parameter in sorted(parameters, key=lambda p: p.numel(), reverse=True):
        least = numbers.index(min(numbers))
        shares[least].append(parameter)
        numbers[least] += parameter.numel()
    return shares
