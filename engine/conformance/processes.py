"""Real processes for the kit: started with torchrun's environment, bounded in time, none left behind."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryFile
from typing import IO, Any

import torch
import torch._dynamo  # the first optimizer imports it: once here, not in each process
import torch.distributed as dist

GRACE = 10.0
"""Seconds in which the others must end when one process has failed."""


class ProcessesFailedError(Exception):
    """Processes raised, died, or did not end in time; `errors` holds what each said, in one line, by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("; ".join(f"process {rank}: {text}" for rank, text in sorted(errors.items())))
        self.errors = errors


def run(P: int, function: Callable[..., Any], *args: Any, seconds: float) -> list[Any]:
    """Call `function(*args)` in P forked processes; return what each returned, in rank order.

    They are started as torchrun starts them, and make their group themselves. Raises ProcessesFailedError, after
    `seconds` at the latest.
    """
    context = multiprocessing.get_context("fork")
    children: dict[Any, Any] = {}
    for rank in range(P):
        ours, theirs = context.Pipe()
        places = TemporaryFile("w+")  # noqa: SIM115 - closed below
        child = context.Process(target=_child, args=(rank, P, theirs, places, function, args))
        child.start()
        theirs.close()
        children[ours] = rank, child, places
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    for pipe in children:
        pipe.send(store.port)  # it has a thread, and to fork beside a thread may leave a lock that nobody opens
    results: list[Any] = [None] * P
    errors: dict[int, str] = {}
    end = time.monotonic() + seconds
    waiting = dict(children)
    try:
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank, child, _ = waiting.pop(pipe)
                results[rank], error = _receive(pipe, child)
                if error:
                    errors[rank] = error
                    end = min(end, time.monotonic() + GRACE)
        for rank, child, places in waiting.values():
            errors[rank] = f"did not end in time ({seconds:g} s, or {GRACE:g} s after another): {_place(child, places)}"
    finally:
        del store
        for pipe, (_, child, places) in children.items():
            child.join(0.0 if errors else GRACE)
            if child.is_alive():
                child.kill()
                child.join()
            pipe.close()
            places.close()
    if errors:
        raise ProcessesFailedError(errors)
    return results


def _place(child: Any, places: IO[str]) -> str:
    """Where the main thread of a process is: the innermost frame that is not torch's."""
    os.kill(child.pid, signal.SIGUSR2)
    time.sleep(0.3)
    places.seek(0)
    thread = places.read().rpartition("(most recent call first):")[2]
    frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', thread)
    file, line, name = next((frame for frame in frames if "/torch/" not in frame[0]), ("nowhere", "0", "?"))
    return f"it is at {os.path.basename(file)}, line {line}, in {name}"


def _receive(pipe: Any, child: Any) -> tuple[Any, str]:
    try:
        value, error = pickle.loads(pipe.recv_bytes())
    except EOFError:
        child.join(GRACE)
        return None, f"died with exit status {child.exitcode}"
    return value, error


def _child(
    rank: int, P: int, pipe: Connection, places: IO[str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.register(signal.SIGUSR2, places)
    torch.set_num_threads(1)
    gc.freeze()  # what was there before the fork is not this process's to collect
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(P),
        LOCAL_WORLD_SIZE=str(P),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(pipe.recv()),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    try:
        message = function(*args), ""
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({os.path.basename(last.filename)}, line {last.lineno})"
        message = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
    pipe.send_bytes(pickle.dumps(message))  # bytes: tensors sent as tensors would live in this process
    pipe.close()
    os._exit(0)  # no exit handlers: they belong to the parent
