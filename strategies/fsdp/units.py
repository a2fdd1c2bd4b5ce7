"""Which submodules of a model FSDP gathers and reduces by themselves, and which it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn


def in_lists(module: nn.Module) -> Iterator[nn.Module]:
    """The children of the outermost ModuleLists that have parameters and a forward."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _members(child)
        else:
            yield from in_lists(child)


def _members(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _members(child)
        elif any(True for _ in child.parameters()):
            yield child


def check_units(model: nn.Module, units: Sequence[nn.Module]) -> None:
    """Refuse what FSDP would refuse later, or not at all. Raises ValueError."""
    home: dict[nn.Module, int] = {}
    for number, unit in enumerate(units):  # inner ones first
        for module in unit.modules():
            home.setdefault(module, number)
    owners: dict[nn.Parameter, set[int]] = {}
    dtypes: dict[int, set[torch.dtype]] = {}
    names = {p: name for name, p in model.named_parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(home.get(module, -1))
            if parameter.requires_grad:
                dtypes.setdefault(home.get(module, -1), set()).add(parameter.dtype)
    for parameter, units_of_it in owners.items():
        if len(units_of_it) > 1:
            raise ValueError(
                f"{names[parameter]} is shared between units of FSDP, which it cannot be: choose others with "
                "FSDPStrategy(wrap=...), so that all modules that share it are in one (wrap=[] makes the model one)."
            )
    for kinds in dtypes.values():
        if len(kinds) > 1:
            raise ValueError(
                f"a unit of FSDP has trainable parameters of dtypes {', '.join(sorted(map(str, kinds)))}: it needs "
                "one. Make them one dtype, or choose other units with FSDPStrategy(wrap=...)."
            )
