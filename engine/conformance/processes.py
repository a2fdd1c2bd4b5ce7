"""Forked processes with torchrun's environment, bounded in time, none left behind."""

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
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

import torch
import torch._dynamo  # the first optimizer imports it: once here, not in each process
import torch.distributed as dist

GRACE = 10.0  # seconds in which the others must end when one process has failed
ENVIRONMENT = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
FORK = multiprocessing.get_context("fork")


class ProcessesFailedError(Exception):
    """Processes raised, died, or did not end in time; `errors` holds one line of each, by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("; ".join(f"process {rank}: {text}" for rank, text in sorted(errors.items())))
        self.errors = errors


def run(P: int, function: Callable[..., Any], *args: Any, seconds: float) -> list[Any]:
    """Call `function(*args)` in P forked processes without a group; return what each returned, in rank order.

    Raises ProcessesFailedError, after `seconds` at the latest.
    """
    port, store = _start_store()
    children: dict[Any, Any] = {}
    for rank in range(P):
        ours, theirs = FORK.Pipe(duplex=False)
        places = TemporaryFile("w+")  # noqa: SIM115 - closed below
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": P, "LOCAL_WORLD_SIZE": P, "MASTER_PORT": port}
        child = FORK.Process(target=_child, args=(environment, theirs, places, partial(function, *args)))
        child.start()
        theirs.close()
        children[ours] = rank, child, places
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
        for pipe, (_, child, places) in children.items():
            child.join(0.0 if errors else GRACE)
            if child.is_alive():
                child.kill()
                child.join()
            pipe.close()
            places.close()
        store.close()
    if errors:
        raise ProcessesFailedError(errors)
    return results


def _place(child: Any, places: IO[str]) -> str:
    """Return the position of a process's main thread: innermost frame outside torch and audit, and innermost."""
    os.kill(child.pid, signal.SIGUSR2)
    time.sleep(0.3)
    places.seek(0)
    thread = places.read().rpartition("(most recent call first):")[2]
    frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', thread) or [("nowhere", "0", "?")]
    ours = next((frame for frame in frames if not re.search("/torch/|/engine/audit/", frame[0])), frames[0])
    told = [f"{os.path.basename(file)}, line {line}, in {name}" for file, line, name in {ours: 1, frames[0]: 1}]
    return f"it is at {', and in it '.join(told)}"


def _start_store() -> tuple[int, Connection]:
    """Start a store in a process of its own; return its port, and the pipe that keeps it while it is open."""
    # a store's thread looks up addresses under a lock of glibc: a process forked meanwhile inherits the locked lock,
    # and waits forever when it looks up an address
    ours, theirs = FORK.Pipe()
    FORK.Process(target=_serve, args=(ours, theirs), daemon=True).start()
    theirs.close()
    return int(ours.recv()), ours


def _serve(ours: Connection, theirs: Connection) -> NoReturn:
    """Keep a store until the processes that could use it have ended, which all hold `ours`."""
    ours.close()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    theirs.send(store.port)
    with suppress(EOFError):
        theirs.recv()
    os._exit(0)


def _receive(pipe: Any, child: Any) -> tuple[Any, str]:
    try:
        return pickle.loads(pipe.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        child.join(GRACE)
        return None, f"died with exit status {child.exitcode}"


def _child(environment: dict[str, int], pipe: Connection, places: IO[str], function: Callable[[], Any]) -> None:
    faulthandler.register(signal.SIGUSR2, places)
    torch.set_num_threads(1)
    gc.freeze()  # what was there before the fork is not this process's to collect
    os.environ.update({name: str(value) for name, value in environment.items()}, **ENVIRONMENT)
    try:
        _end(pipe, (function(), ""))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({os.path.basename(last.filename)}, line {last.lineno})"
        _end(pipe, (None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"))


def _end(pipe: Connection, message: tuple[Any, str]) -> NoReturn:
    """Send and exit, without freeing anything (DDP may wait forever in it) and without the parent's exit handlers."""
    pipe.send_bytes(pickle.dumps(message))  # bytes: tensors sent as tensors would live in this process
    os._exit(0)
