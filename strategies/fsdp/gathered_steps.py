"""Steps of optimizers that need whole parameters, where each process holds a shard of each."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from strategies.optimizer_shards import OptimizerShards
from strategies.optimizers import parts_of

NEEDS_WHOLE = {"Adafactor", "Muon", "Rprop"}
"""Class names of optimizers, of torch and of other libraries, whose step is wrong or fails on shards (torch 2.13)."""


def need_whole(optimizer: Optimizer) -> list[Optimizer]:
    """Return those, of the optimizers that step together, that need whole parameters: by class, or as they declare."""
    return [
        part
        for part in parts_of(optimizer)
        if getattr(part, "needs_whole_parameters", any(kind.__name__ in NEEDS_WHOLE for kind in type(part).__mro__))
    ]


class GatheredSteps(OptimizerShards):
    """Lets one process step each parameter: it gathers that, one at a time, and keeps its state, whole."""

    @torch.no_grad()
    def _hide(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._gathered: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in (p for share in self._shares for p in share if p.grad is not None):
            value, gradient = _whole(parameter), _whole(parameter.grad)
            if parameter not in self.elsewhere:
                whole = self._gathered[parameter] = nn.Parameter(value)
                whole.grad = gradient
                optimizer.state[whole] = optimizer.state.pop(parameter, {})
        super()._hide(optimizer, args, kwargs)
        for group in optimizer.param_groups:
            group["params"] = [self._gathered.get(p, p) for p in group["params"]]

    @torch.no_grad()
    def _send(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, whole in self._gathered.items():
            optimizer.state[parameter] = optimizer.state.pop(whole)
        super()._send(optimizer, args, kwargs)

    def _broadcast(self, share: list[nn.Parameter], owner: int) -> None:
        for parameter in share:
            if parameter.grad is None:
                continue
            whole = self._gathered.pop(parameter, None)
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            value = value if whole is None else whole.detach()
            dist.broadcast(value, group=self._group, group_src=owner)
            shards: Any = parameter  # a DTensor
            shards.copy_(distribute_tensor(value, shards.device_mesh, shards.placements, src_data_rank=None))


def _whole(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()
