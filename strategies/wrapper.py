"""Wrappers of a model that have the model's own methods and attributes too."""

from __future__ import annotations

from typing import Any

from torch import nn


class ShowsModel(nn.Module):
    """Looks up in `module` what the wrapper itself does not have, and sets there what the module already has.

    A call of a method is not a call of the wrapper: it communicates nothing.
    """

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        return getattr(modules["module"], name) if "module" in modules else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None or name in self.__dict__ or name in self._modules or not _has(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)


def _has(module: nn.Module, name: str) -> bool:
    own = module.__dict__
    return name in own or any(name in own[kind] for kind in ("_parameters", "_buffers", "_modules"))
