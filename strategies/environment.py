"""What a process is told of itself, by torchrun or by a group that exists: the only place that reads it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_meetings = itertools.count()
_notebooks = itertools.count()


def started_processes() -> int:
    """Return the processes of the group that exists, else those that torchrun started; 1 without either."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """Return this process among them, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def started_local_rank() -> int:
    """Return this process among those of its host, from 0; its rank where nothing tells."""
    return int(os.environ.get("LOCAL_RANK", started_rank()))


@contextmanager
def as_if_started(processes: int) -> Iterator[None]:
    """Let strategies answer as on process 0 of so many, to plan for them; none is started, none may be set up."""
    told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    os.environ.update(WORLD_SIZE=str(processes), RANK="0", LOCAL_RANK="0")
    try:
        yield
    finally:
        for name, value in told.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def rendezvous(timeout: timedelta) -> Any:
    """Return the store in which the processes meet: torchrun's, under a name that no earlier meeting used.

    A restarted or second group that found the addresses of the first would wait for processes that are gone. Where
    torchrun's agent keeps one store for all restarts, their number makes the difference; a store that is made for each
    needs none, and agents that came at different times have counted differently.
    """
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if keeps_store else "new"
    name = f"tally/{restart}/{next(_meetings)}"
    if started_processes() == 1:
        return dist.PrefixStore(name, dist.HashStore())  # type: ignore[attr-defined]
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def new_store() -> Any:
    """Return a part of the group's own store for notes between processes, a new one each time."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"tally/notes/{next(_notebooks)}", store)  # type: ignore[attr-defined]
