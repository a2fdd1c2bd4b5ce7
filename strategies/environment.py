"""Rank and number of processes, from a process group or torchrun's environment. Nothing else reads them."""

import itertools
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from strategies.errors import UserError

_groups = itertools.count()
_boards = itertools.count()


def started_processes() -> int:
    """Return the size of the process group, else the number of processes that torchrun started, else 1.

    Raises UserError, as the next two do, for variables that are no numbers or contradict one another.
    """
    return dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1, least=1)


def started_rank() -> int:
    """Return the rank of this process."""
    if dist.is_initialized():
        return dist.get_rank()
    if "RANK" not in os.environ and started_processes() > 1:
        raise UserError(f"RANK is missing: expected it beside WORLD_SIZE={started_processes()}. {_WAY_OUT}")
    return _number("RANK", 0, below=started_processes())


def started_local_rank() -> int:
    """Return the rank of this process on its host; without LOCAL_RANK, its rank."""
    return _number("LOCAL_RANK", started_rank(), below=started_processes())


_WAY_OUT = "Start several processes by torchrun, which sets all of these, or unset them for one process."


def _number(name: str, otherwise: int, least: int = 0, below: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        return otherwise
    value = int(text) if text.isdecimal() and len(text) < 10 else -1
    if value < least or (below is not None and value >= below):
        limit = "" if below is None else f" and below WORLD_SIZE={below}"
        raise UserError(f"{name}={text!r}: expected a whole number of at least {least}{limit}. {_WAY_OUT}")
    return value


def as_if_started(processes: int) -> AbstractContextManager[Any]:
    """Make strategies answer as on process 0 of `processes`, to plan for them. No strategy may be set up."""
    from unittest.mock import patch  # slow to import: only here

    return patch.dict(os.environ, WORLD_SIZE=str(processes), RANK="0", LOCAL_RANK="0")


def rendezvous(timeout: timedelta) -> Any:
    """Return the store of a new process group: torchrun's, under a prefix that no earlier group used."""
    # A restarted or second group that read the addresses of the first would wait for processes that are gone. If
    # torchrun's agent keeps one store for all restarts, the prefix holds their number. If each restart makes a store,
    # it must not: agents that joined at different times have different numbers.
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if keeps_store else "new"
    name = f"tally/{restart}/{next(_groups)}"
    if started_processes() == 1:
        return dist.PrefixStore(name, dist.HashStore())  # type: ignore[attr-defined]
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(f"{missing[0]} is missing: expected it beside WORLD_SIZE={started_processes()}. {_WAY_OUT}")
    if not 0 < _number("MASTER_PORT", 0) < 65536:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']!r}: expected a port from 1 to 65535. {_WAY_OUT}")
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def new_store() -> Any:
    """Return a new part of the group's own store, for texts between processes."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"tally/notes/{next(_boards)}", store)  # type: ignore[attr-defined]
