"""What torchrun tells a process of itself: the only place that reads it."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_meetings = itertools.count()


def started_processes() -> int:
    """Return how many processes torchrun started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """Return this process among all that were started, from 0."""
    return int(os.environ.get("RANK", "0"))


def started_local_rank() -> int:
    """Return this process among those of its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rendezvous(timeout: timedelta) -> Any:
    """Return the store in which the processes meet: torchrun's, under a name that no earlier meeting used.

    A restarted or second group that found the addresses of the first would wait for processes that are gone.
    """
    name = f"tally/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    if started_processes() == 1:
        return dist.PrefixStore(name, dist.HashStore())  # type: ignore[attr-defined]
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
