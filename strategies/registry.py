"""Strategies by name: those that are built in, those that installed packages add, and any by its class path."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from strategies.base import Strategy
from strategies.ddp.strategy import DDPStrategy
from strategies.dp import DPStrategy
from strategies.environment import started_processes
from strategies.fsdp.strategy import FSDPStrategy
from strategies.pipeline.strategy import PipelineStrategy
from strategies.single import SingleDeviceStrategy

NAMED: dict[str, type[Strategy]] = {
    "single": SingleDeviceStrategy,
    "dp": DPStrategy,
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "pipeline": PipelineStrategy,
}

ENTRY_POINTS = "tally.strategies"
"""The group of entry points by which an installed package adds a name."""


def resolve(strategy: Strategy | str) -> Strategy:
    """Return the strategy of that name, or class path, with its defaults; an instance is returned as it is.

    "auto" is DDP where several processes were started, else the single device (CUDA where there is one). Raises
    ValueError as `find` does.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return DDPStrategy() if started_processes() > 1 else SingleDeviceStrategy()
    return find(strategy)()


def find(name: str) -> type[Strategy]:
    """Return the class of that name or class path; an installed package cannot take a name that is built in.

    Raises ValueError for an unknown name, with the known ones and the nearest, and for what is no whole Strategy.
    """
    if not isinstance(name, str):
        raise ValueError(_message(name, ""))
    if name in NAMED:
        return NAMED[name]
    installed = _installed()
    if name in installed:
        return _checked(name, installed[name].load, f" ({installed[name].value}, of an installed package)")
    if "." in name:
        return _checked(name, lambda: _imported(name))
    near = get_close_matches(name, ["auto", *NAMED, *installed], n=1)
    raise ValueError(_message(name, f" Did you mean {near[0]!r}?" if near else ""))


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _checked(name: str, load: Any, where: str = "") -> type[Strategy]:
    try:
        found = load()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(_message(name, f" This one{where} could not be imported: {error}.")) from None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ValueError(_message(name, f" {found!r}{where} is not a subclass of strategies.Strategy."))
    if missing := ", ".join(sorted(found.__abstractmethods__)):
        raise ValueError(_message(name, f" {found!r}{where} does not give {missing}."))
    return found


def _message(name: object, reason: str) -> str:
    installed = sorted(set(_installed()) - set(NAMED))
    added = f" (installed: {', '.join(installed)})" if installed else ""
    names = ", ".join(["auto", *NAMED])
    return f"strategy={name!r}: choose one of {names}{added}, or give a Strategy or its class path.{reason}"
