"""Free memory, for errors before something would not fit."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path

import torch


def free_memory(device: torch.device | None = None) -> float:
    """Return the free bytes of a CUDA device, else of this host; inf if it does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
            return 1024 * int(found[1])
    return math.inf
