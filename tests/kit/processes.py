"""Real processes for tests: forked, met through a file, bounded in time, none left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch._dynamo  # by the first optimizer
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # by the first checkpoint

Result = TypeVar("Result")

# done once here, not for the first time in each process: kernels, and the source lines of torch's own tracebacks
torch.manual_seed(torch.initial_seed())
safetensors.torch.save({"": torch.tanh(torch.nn.Linear(1, 1).double().weight.detach())})


class ChildError(AssertionError):
    """A child raised; the message holds each child's traceback, `errors` their one-line texts by rank."""

    def __init__(self, tracebacks: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- process {rank}\n{text}" for rank, text in tracebacks.items()))
        self.errors = {rank: text.strip().splitlines()[-1] for rank, text in tracebacks.items()}


def run(
    P: int,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 60,
    group: bool = True,
    timeout: float = 30,
    fresh: bool = False,
) -> list[Any]:
    """Call `function(*args)` in P processes of one gloo group; return what each returned, in rank order.

    All has `seconds`, each wait of the group for another process `timeout`. `fresh` processes are forked from one that
    has imported torch, and done nothing: for devices, whose threads no fork takes over. They find `function` by name.
    """
    multiprocessing.set_forkserver_preload(["safetensors.torch", "torch._dynamo", "torch.distributed.checkpoint"])
    context: Any = multiprocessing.get_context("forkserver" if fresh else "fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = [], []
        for rank in range(P):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(rank, P, f"{folder}/store", theirs, timeout if group else None, function, args)
            )
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        end = time.monotonic() + seconds
        results, failures = [None] * P, {}
        try:
            for rank, pipe in enumerate(pipes):
                try:
                    waiting = max(0.0, end - time.monotonic())
                    good, value = pickle.loads(pipe.recv_bytes()) if pipe.poll(waiting) else (False, "timed out")
                except EOFError:
                    children[rank].join(5)
                    good, value = False, f"died with exit code {children[rank].exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
        finally:
            for child in children:
                child.join(0.0 if failures else 10.0)
                if child.is_alive():
                    child.kill()
                    child.join()
    if failures:
        raise ChildError(failures)
    return results


def on_processes(P: int, **options: Any) -> Callable[[Callable[[], Result]], list[Result]]:
    """Call the decorated function at once, in P forked processes; its name becomes the list of what each returned.

    The list is in rank order. The function may read the variables of the test around it. `options` are those of `run`,
    except `fresh`.
    """
    return lambda function: run(P, function, **options)


def _child(
    rank: int,
    P: int,
    store: str,
    pipe: Connection,
    timeout: float | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        gc.freeze()  # what was there before the fork is not this process's to collect
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(P))
        if timeout is not None:
            wait = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=dist.FileStore(store, P), rank=rank, world_size=P, timeout=wait)
            dist.barrier()  # or a short function would end while others are still connecting to this process
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))  # bytes: tensors sent as tensors would live in this process
    pipe.close()
    os._exit(0)  # no exit handlers: they belong to the parent
