"""Strategies by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.dp import DPStrategy
from strategies.environment import started_processes
from strategies.single import SingleDeviceStrategy

NAMED: dict[str, type[Strategy]] = {"single": SingleDeviceStrategy, "dp": DPStrategy, "ddp": DDPStrategy}


def resolve(strategy: str | Strategy) -> Strategy:
    """Return the strategy of that name with its defaults; an instance is returned as it is.

    "auto" is DDP where several processes were started, else the single device (CUDA where there is one). Raises
    ValueError for an unknown name, with the known ones and the nearest.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return DDPStrategy() if started_processes() > 1 else SingleDeviceStrategy()
    if isinstance(strategy, str) and strategy in NAMED:
        return NAMED[strategy]()
    names = ", ".join(["auto", *NAMED])
    near = get_close_matches(str(strategy), ["auto", *NAMED], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if "." in str(strategy):
        hint = f" {_why_not(str(strategy))}"
    raise ValueError(f"strategy={strategy!r}: choose one of {names}, or give a Strategy or its class path.{hint}")


def _why_not(class_path: str) -> str:
    """Say why a class path is no Strategy."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        return f"This one could not be imported: {error}."
    return f"{found!r} is not a subclass of strategies.Strategy."
