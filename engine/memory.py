"""Memory: what is free, what was used, and what to do when it has run out."""

import gc
import math
import re
import resource
import sys
import traceback
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


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: on its GPU if it has one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's allocator of the host raises a plain RuntimeError."""
    on_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def release(device: torch.device, error: BaseException | None = None) -> None:
    """Free what the frames of `error` hold, such as the graph of a forward, what is unused, and the device's cache."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    backend = torch.get_device_module(device)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
