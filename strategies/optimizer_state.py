"""An optimizer's state under the names of the model's parameters, where one process holds all of it.

`torch.distributed.checkpoint.state_dict` offers the same, but makes a trial step where an optimizer has no state yet,
which counts in Adam's bias correction: a run that saved would not be the run that did not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return {"state": {name: ...}, "param_groups": [...]}; parameters without state (unused ones) have no entry."""
    names = parameter_names(model)
    return {
        "state": {names[p]: dict(state) for p, state in optimizer.state.items()},
        "param_groups": [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups],
    }


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole of named states that hold a part of the parameters each, with the same groups."""
    return {**parts[0], "state": {name: state for part in parts for name, state in part["state"].items()}}


HOW_TO_STEP = ("foreach", "fused")
"""What groups say of the kernels that step: a run that goes on has its own."""


def load_named_state(
    model: nn.Module, optimizer: Optimizer, saved: dict[str, Any], elsewhere: Collection[Tensor] = ()
) -> None:
    """Load what `named_state` returned, but for the state of parameters that other processes step (`elsewhere`).

    Raises ValueError for other parameters, groups or shapes.
    """
    names = parameter_names(model)
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in saved["param_groups"]]
    if groups != saved_groups:
        raise ValueError(f"the optimizer's groups hold {_sizes(groups)}, those saved hold {_sizes(saved_groups)}.")
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    number = {names[p]: index for index, p in enumerate(flat)}
    for name, state in saved["state"].items():
        if name not in number:
            raise ValueError(f"the saved optimizer has state for {name!r}, which this optimizer does not hold.")
        _check_shapes(optimizer, name, flat[number[name]], state)
    states = {name: state for name, state in saved["state"].items() if flat[number[name]] not in elsewhere}
    first = iter(range(len(flat)))
    loaded = []
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        own = {name: group[name] for name in HOW_TO_STEP if name in group}
        loaded.append({**saved_group, **own, "params": [next(first) for _ in group["params"]]})
    optimizer.load_state_dict(
        {"state": {number[name]: state for name, state in states.items()}, "param_groups": loaded}
    )
    for name, state in states.items():  # torch has cast it to the parameter's dtype, but for `step`, or kept it
        own = optimizer.state[flat[number[name]]]
        for key, value in state.items():
            if isinstance(value, Tensor) and (own[key] is value or (own[key].dtype != value.dtype and key != "step")):
                own[key] = value.to(own[key].device, copy=True)


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the user's own name of each parameter."""
    return {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}


def _sizes(groups: list[list[str]]) -> str:
    return f"{[len(group) for group in groups]} parameters ({groups[0][0]}, ...)" if groups and groups[0] else "none"


def _check_shapes(optimizer: Optimizer, name: str, parameter: Tensor, state: dict[str, Any]) -> None:
    """Only torch's own optimizers are known to keep tensors of the parameter's shape, all but Adafactor."""
    if type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, torch.optim.Adafactor):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"the saved {key} of {name} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}."
                )
