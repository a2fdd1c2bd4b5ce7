"""DistributedDataParallel with the model's own methods and attributes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.wrapper import ShowsModel


class Wrapper(ShowsModel, DistributedDataParallel):
    """Looks up in the model what DistributedDataParallel does not have."""


def depends_on(loss: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a gradient of `loss` reaches one of `parameters`."""
    known = {id(parameter) for parameter in parameters}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in known:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def zero_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return 0 as a function of `parameters`, the sum of none of their rows: `p.sum() * 0` may be NaN."""
    return torch.stack([p.unsqueeze(0)[:0].sum() for p in parameters]).sum()
