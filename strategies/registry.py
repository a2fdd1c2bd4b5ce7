"""The registry of strategies: built-in names, and class paths."""

from difflib import get_close_matches
from importlib import import_module

from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.environment import started_processes
from strategies.errors import UserError
from strategies.single import SingleDeviceStrategy

NAMED = {
    "single": "strategies.SingleDeviceStrategy",
    "dp": "strategies.DPStrategy",
    "ddp": "strategies.DDPStrategy",
    "fsdp": "strategies.FSDPStrategy",
    "pipeline": "strategies.PipelineStrategy",
}


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
    """Return the class of that name or class path. Raises UserError if it is not one, or is incomplete."""
    if isinstance(name, str):
        name = NAMED.get(name, name)
    if not isinstance(name, str) or "." not in name:
        near = get_close_matches(str(name), ["auto", *NAMED], n=1)
        raise UserError(_message(name, f" Did you mean {near[0]!r}?" if near else ""))
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(_message(name, f" This one could not be imported: {error}.")) from None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UserError(_message(name, f" {found!r} is not a subclass of strategies.Strategy."))
    if missing := ", ".join(sorted(found.__abstractmethods__)):
        raise UserError(_message(name, f" {found!r} does not define {missing}."))
    return found


def _message(name: object, reason: str) -> str:
    names = ", ".join(["auto", *NAMED])
    return f"strategy={name!r}: expected one of {names}, a Strategy or its class path.{reason}"
