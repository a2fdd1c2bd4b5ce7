"""The state of an optimizer under the names of the model's parameters, if one process holds all of it.

`torch.distributed.checkpoint.state_dict` makes a trial step if an optimizer has no state: saving would change the run.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from strategies.errors import UserError


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return {"state": {name: ...}, "param_groups": [...]}; parameters without state (unused ones) are left out."""
    names = parameter_names(model)
    return {
        "state": {names[p]: dict(state) for p, state in optimizer.state.items() if not p.is_meta},
        "param_groups": [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups],
    }


def copy_of(value: Any, copied: Callable[[Tensor], Tensor]) -> Any:
    """Return nested `value` with its tensors copied; dictionaries and lists are walked faster than by `tree_map`."""
    if isinstance(value, Tensor):
        return copied(value)
    if type(value) is dict:
        return {key: copy_of(item, copied) for key, item in value.items()}
    if type(value) is list:
        return [copy_of(item, copied) for item in value]
    return value if isinstance(value, str | float | None) else tree_map_only(Tensor, copied, value)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the union of named states, each of which holds a part of the parameters of the same groups."""
    return {**parts[0], "state": {name: state for part in parts for name, state in part["state"].items()}}


HOW_TO_STEP = ("foreach", "fused")  # entries of groups that choose the kernel of a step: a resumed run keeps its own


def load_named_state(
    model: nn.Module, optimizer: Optimizer, saved: dict[str, Any], elsewhere: Collection[Tensor] = ()
) -> None:
    """Load what `named_state` returned, except for `elsewhere`. Raises UserError if it does not fit."""
    names = parameter_names(model)
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in saved["param_groups"]]
    if groups != saved_groups:
        raise UserError(f"the optimizer's groups hold {_sizes(groups)}, those saved hold {_sizes(saved_groups)}.")
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    number = {names[p]: index for index, p in enumerate(flat)}
    for name, state in saved["state"].items():
        if name not in number:
            raise UserError(f"the saved optimizer has state for {name!r}, which this optimizer does not hold.")
        _check_shapes(optimizer, name, flat[number[name]], state)
    states = {name: state for name, state in saved["state"].items() if flat[number[name]] not in elsewhere}
    loaded = []
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        kernel = {name: group[name] for name in HOW_TO_STEP if name in group}
        loaded.append({**saved_group, **kernel, "params": [number[name] for name in saved_group["params"]]})
    optimizer.load_state_dict({"state": {number[n]: state for n, state in states.items()}, "param_groups": loaded})
    for name, state in states.items():  # torch has kept it, or cast all but `step` to the parameter's dtype
        loaded_state = optimizer.state[flat[number[name]]]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            current = loaded_state[key]
            if current is value or (current.dtype != value.dtype and key != "step"):
                loaded_state[key] = value.to(current.device, copy=True)


def user_name(name: str) -> str:
    """Return the user's own name of a parameter or buffer, without the `_orig_mod.` that `torch.compile` adds."""
    return name.replace("_orig_mod.", "")


def user_module(model: nn.Module) -> nn.Module:
    """Return the user's own model, without the wrapper of `torch.compile`."""
    module: nn.Module = getattr(model, "_orig_mod", model)
    return module


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the user's own name of each parameter."""
    return {p: user_name(name) for name, p in model.named_parameters()}


def _sizes(groups: list[list[str]]) -> str:
    return f"{[len(group) for group in groups]} parameters ({groups[0][0]}, ...)" if groups and groups[0] else "none"


def _check_shapes(optimizer: Optimizer, name: str, parameter: Tensor, state: dict[str, Any]) -> None:
    """Check the optimizers of torch alone, without Adafactor: their tensors have the parameter's shape."""
    if type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, torch.optim.Adafactor):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                seen, expected = tuple(value.shape), tuple(parameter.shape)
                raise UserError(f"the saved {key} of {name} has shape {seen} instead of {expected}.")
