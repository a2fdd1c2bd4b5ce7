"""The registry of strategies: built-in names, names that installed packages add, and class paths."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.dp import DPStrategy
from strategies.environment import started_processes
from strategies.errors import UserError
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

ENTRY_POINTS = "tally.strategies"  # the group of entry points by which an installed package adds a name


def resolve(strategy: Strategy | str) -> Strategy:
    """Return the strategy of that name, or class path, with its defaults; an instance is returned as it is.

    "auto" is DDP if several processes were started, else the single device (CUDA if available). Raises UserError as
    `find` does.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return DDPStrategy() if started_processes() > 1 else SingleDeviceStrategy()
    return find(strategy)()


def find(name: str) -> type[Strategy]:
    """Return the class of that name or class path; an installed package cannot take a name that is built in.

    Raises UserError for an unknown name, with the known ones and the nearest, and for an incomplete Strategy.
    """
    if not isinstance(name, str):
        raise UserError(_message(name, ""))
    if name in NAMED:
        return NAMED[name]
    installed = _installed()
    if name in installed:
        return _checked(name, installed[name].load, f" ({installed[name].value}, of an installed package)")
    if "." in name:
        return _checked(name, lambda: _imported(name))
    near = get_close_matches(name, ["auto", *NAMED, *installed], n=1)
    raise UserError(_message(name, f" Did you mean {near[0]!r}?" if near else ""))


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _checked(name: str, load: Any, where: str = "") -> type[Strategy]:
    try:
        loaded = load()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(_message(name, f" This one{where} could not be imported: {error}.")) from None
    if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
        raise UserError(_message(name, f" {loaded!r}{where} is not a subclass of strategies.Strategy."))
    if missing := ", ".join(sorted(loaded.__abstractmethods__)):
        raise UserError(_message(name, f" {loaded!r}{where} does not define {missing}."))
    return loaded


def _message(name: object, reason: str) -> str:
    installed = sorted(set(_installed()) - set(NAMED))
    added = f" (installed: {', '.join(installed)})" if installed else ""
    names = ", ".join(["auto", *NAMED])
    return f"strategy={name!r}: expected one of {names}{added}, a Strategy or its class path.{reason}"
