"""Meters of this thread: the processor's own count of its instructions (Linux: perf_event_open), and its CPU time."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import time

SYSTEM_CALL = {"x86_64": 298, "aarch64": 241}
HARDWARE, INSTRUCTIONS = 0, 1
DISABLED, PINNED, WITHOUT_KERNEL, WITHOUT_HYPERVISOR = 1 << 0, 1 << 2, 1 << 5, 1 << 6
ENABLE, DISABLE = 0x2400, 0x2401
SIZE = 128
"""Bytes of the kernel's `perf_event_attr`, of which all but four fields stay 0."""


class InstructionCounter:
    """Counts once, from `start` to `stop`. Raises OSError where there is nothing to count with, as in many a cloud."""

    count = 0

    def __init__(self) -> None:
        number = SYSTEM_CALL.get(os.uname().machine)
        if sys.platform != "linux" or number is None:
            raise OSError(f"no instruction counter is known for {sys.platform} on {os.uname().machine}")
        options = DISABLED | PINNED | WITHOUT_KERNEL | WITHOUT_HYPERVISOR
        attributes = struct.pack("IIQQQQQ", HARDWARE, SIZE, INSTRUCTIONS, 0, 0, 0, options).ljust(SIZE, b"\0")
        self._file = ctypes.CDLL(None, use_errno=True).syscall(number, attributes, 0, -1, -1, 0)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def start(self) -> None:
        fcntl.ioctl(self._file, ENABLE, 0)

    def stop(self) -> None:
        """Raises OSError where the processor had no counter left for this one."""
        fcntl.ioctl(self._file, DISABLE, 0)
        found = os.read(self._file, 8)
        os.close(self._file)
        if not found:
            raise OSError("others use all of this processor's counters: an instruction may have gone uncounted")
        self.count = int.from_bytes(found, sys.byteorder)


class ThreadClock:
    """Measures the CPU time of this thread from `start` to `stop`, in nanoseconds, system calls included."""

    count = 0

    def start(self) -> None:
        self._began = time.thread_time_ns()

    def stop(self) -> None:
        self.count = time.thread_time_ns() - self._began
