"""Strategies by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.dp import DPStrategy
from strategies.environment import started_processes
from strategies.fsdp import FSDPStrategy
from strategies.pipeline import PipelineStrategy
from strategies.single import SingleDeviceStrategy

NAMED: dict[str, type[Strategy]] = {
    "single": SingleDeviceStrategy,
    "dp": DPStrategy,
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "pipeline": PipelineStrategy,
}


def resolve(strategy: Strategy | str) -> Strategy:
    """Return the strategy of that name, or class path, with its defaults; an instance is returned as it is.

    "auto" is DDP where several processes were started, else the single device (CUDA where there is one). Raises
    ValueError for an unknown name, with the known ones and the nearest.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return DDPStrategy() if started_processes() > 1 else SingleDeviceStrategy()
    names = ["auto", *NAMED]
    reason = ""
    if isinstance(strategy, str):
        if strategy in NAMED:
            return NAMED[strategy]()
        if near := get_close_matches(strategy, names, n=1):
            reason = f" Did you mean {near[0]!r}?"
        elif "." in strategy:
            module, _, name = strategy.rpartition(".")
            try:
                found = getattr(import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                reason = f" This one could not be imported: {error}."
            else:
                if isinstance(found, type) and issubclass(found, Strategy):
                    return found()
                reason = f" {found!r} is not a subclass of strategies.Strategy."
    raise ValueError(
        f"strategy={strategy!r}: choose one of {', '.join(names)}, or give a Strategy or its class path.{reason}"
    )
