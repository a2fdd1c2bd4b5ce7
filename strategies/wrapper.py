"""Wrappers of a model that have the model's own methods and attributes too."""

from typing import Any

from torch import nn


class ShowsModel(nn.Module):
    """Looks up in `module` what the wrapper itself does not have, and sets there what the module already has.

    A call of a method is not a call of the wrapper: it communicates nothing. Names that both have are the wrapper's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.__dict__["_is_built"] = True

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        return getattr(modules["module"], name) if "module" in modules else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = "_is_built" not in self.__dict__ or name in self.__dict__ or name in self._modules
        if not is_own and _has(self.module, name):
            setattr(self.module, name, value)
        else:
            super().__setattr__(name, value)


def _has(module: nn.Module, name: str) -> bool:
    own = module.__dict__
    is_property = isinstance(getattr(type(module), name, None), property)
    return is_property or name in own or any(name in own[kind] for kind in ("_parameters", "_buffers", "_modules"))
