"""The units of FSDP: submodules that are gathered and reduced as a whole."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from strategies.errors import UserError


def in_lists(module: nn.Module, is_inside: bool = False) -> Iterator[nn.Module]:
    """Yield the children of the outermost ModuleLists that have parameters and a forward."""
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList)
        if is_list or not is_inside or isinstance(child, nn.ModuleDict):
            yield from in_lists(child, is_inside or is_list)
        elif any(True for _ in child.parameters()):
            yield child


def of_classes(model: nn.Module, wrap: Sequence[str]) -> list[nn.Module]:
    """Return the submodules of these classes, inner ones first. Raises UserError for a class without one."""
    units = [m for m in model.modules() if m is not model and type(m).__name__ in wrap]
    if missing := set(wrap) - {type(m).__name__ for m in units}:
        names = ", ".join(sorted({type(m).__name__ for m in model.modules() if m is not model}))
        raise UserError(f"wrap={wrap!r}: expected classes of submodules ({names}); {', '.join(missing)} is not one.")
    return units[::-1]


def check_units(model: nn.Module, units: Sequence[nn.Module]) -> None:
    """Raise UserError for units that FSDP would refuse later, or not at all."""
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
            raise UserError(
                f"{names[parameter]} is shared between units of FSDP: expected all modules that share it in one unit. "
                "Use FSDPStrategy(wrap=...) to choose units (wrap=[] makes the whole model one)."
            )
    for kinds in dtypes.values():
        if len(kinds) > 1:
            seen = f"a unit of FSDP has trainable parameters of dtypes {', '.join(sorted(map(str, kinds)))}"
            raise UserError(f"{seen}: expected one. Convert them, or choose other units with FSDPStrategy(wrap=...).")
