"""Strategies of several processes: their process group, and the messages between processes."""

import hashlib
import os
import resource
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.base import Strategy
from strategies.environment import new_store, rendezvous, started_local_rank, started_processes, started_rank
from strategies.errors import UserError
from strategies.host_messages import HostMessages, PendingRows
from strategies.optimizer_shards import OptimizerShards
from strategies.optimizer_state import load_named_state, merged
from strategies.status_board import StatusBoard
from strategies.summed_message import SummedMessage
from strategies.torch_internals import check_torch, is_lost_contact

SPARE_FILES = 128  # open files of a process beside its connections: libraries, data, logs
LARGEST_MESH = 64
"""The most processes that connect each to each at the start. More connect to those that they send to, log2 of them."""


class ProcessGroupStrategy(Strategy):
    """Base of the strategies of several processes: gloo on CPU, NCCL on CUDA, started from torchrun's environment.

    An existing process group is used and left in place. `timeout_seconds` bounds every wait for another process,
    `device` is "cpu" or "cuda" (default: CUDA if available).
    """

    largest_rows = 8
    """The most processes that exchange rows of numbers; more add them up, in log2(processes) messages each."""

    _shards: OptimizerShards | None = None
    _torch_parts: tuple[str, ...] = ()  # private parts of torch that a strategy uses: see `strategies.torch_internals`

    def __init__(self, timeout_seconds: float = 300.0, device: Literal["cpu", "cuda"] | None = None) -> None:
        if not timeout_seconds > 0:
            raise UserError(f"timeout_seconds={timeout_seconds}: expected the seconds of a collective, more than 0.")
        if device not in ("cpu", "cuda", None):
            raise UserError(f"device={device!r}: expected 'cpu' or 'cuda', or None for CUDA if available.")
        self.timeout = timedelta(seconds=timeout_seconds)
        self._device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._backend = "nccl" if self._device_type == "cuda" else "gloo"
        self._owns_group = False
        self._host_group: dist.ProcessGroup | None = None
        self._board = HostMessages()
        self._summed: SummedMessage | None = None

    def effective_batch(self, N: int, K: int) -> int:
        return self.data_parallel_size * N * K

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else started_rank()

    @property
    def local_rank(self) -> int:
        return started_local_rank()

    @property
    def data_parallel_size(self) -> int:
        return self.processes

    @property
    def processes(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else started_processes()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._device_type == "cpu" else torch.device("cuda", self.local_rank)

    def describe(self) -> str:
        backend = dist.get_backend() if dist.is_initialized() else self._backend
        return f"{self.name}: {self.data_parallel_size} x {self._device_type}, {backend}"

    def setup(self) -> None:
        """Join the processes: a group for gradients, and one on the CPU for messages.

        Raises UserError for too few GPUs or open files, and RuntimeError if this torch lacks a part.
        """
        check_torch(self.name, self._torch_parts)
        if self._device_type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"device='cuda': expected a GPU for each process of this host; process {self.local_rank} has none "
                    f"of the {torch.cuda.device_count()}. Start as many processes, or use device='cpu'."
                )
            torch.cuda.set_device(self.device)
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder: which collective hung
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        lazily = self.processes > LARGEST_MESH
        if lazily:
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        _check_open_files(self.processes, self.rank, lazily)
        if not dist.is_initialized():
            self._owns_group = True
            store = rendezvous(self.timeout)
            dist.init_process_group(
                self._backend, timeout=self.timeout, store=store, rank=started_rank(), world_size=started_processes()
            )
        self._host_group = dist.new_group(backend="gloo", timeout=self.timeout)
        self._board = StatusBoard(new_store(), self.rank, self.processes)
        if lazily:  # connect while all are there: a lazy connection waits without end for the dead
            for group in (None, self._host_group):
                dist.barrier(group=group)

    def teardown(self) -> None:
        self.release_model()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        elif self._host_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._host_group)
        self._owns_group, self._host_group, self._board, self._summed = False, None, HostMessages(), None

    def release_model(self) -> None:
        if self._shards is not None:
            self._shards.remove()
        self._shards = None
        super().release_model()

    @property
    def needs_equal_windows(self) -> bool:
        return self.data_parallel_size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in self._model.modules())

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def exchange(self, values: Sequence[float]) -> PendingRows:
        if self.processes > self.largest_rows:
            self._summed = SummedMessage(values, self._host_group, self._summed)
            return self._summed.rows
        row = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.processes)]
        work = dist.all_gather(rows, row, group=self._host_group, async_op=True)

        def wait() -> list[list[float]]:
            work.wait()
            return [values.tolist() for values in rows]

        return wait

    def gather(self, value: Any) -> list[Any]:
        return self.first(self.collect(value))  # type: ignore[no-any-return]

    def collect(self, value: Any) -> list[Any]:
        """Send up a binary tree: each process receives from at most log2(processes) others."""
        rows, distance = [value], 1
        while distance < self.processes and not self.rank & distance:
            if (source := self.rank + distance) < self.processes:
                received: list[Any] = [None]
                dist.recv_object_list(received, src=source, group=self._host_group)
                rows += received[0]
            distance *= 2
        if self.rank:
            dist.send_object_list([rows], dst=self.rank - distance, group=self._host_group)
        return rows

    def first(self, value: Any) -> Any:
        values = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]

    def compare(self, value: Any) -> list[Any]:
        """Compare digests first, and gather the values only if they differ."""
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6])
        self._summed = SummedMessage([0.0, digest, -digest], self._host_group, self._summed)
        most, least = self._summed.rows()[0][1:]
        return [value] if most == -least else self.gather(value)

    def gather_bytes(self, data: Tensor, most: int) -> list[Tensor]:
        padded = torch.nn.functional.pad(data, (0, most - data.numel()))
        rows = [torch.empty_like(padded) for _ in range(self.processes)]
        dist.all_gather(rows, padded)
        return rows

    def post(self, topic: str, text: str) -> None:
        self._board.post(topic, text)

    def posted(self, topic: str) -> dict[int, str]:
        return self._board.posted(topic)

    def report(self, failure: str) -> None:
        self._board.report(failure)

    def reported(self) -> str:
        return self._board.reported()

    def has_lost_contact(self, error: Exception) -> bool:
        return is_lost_contact(error)

    def barrier(self) -> None:
        dist.barrier(group=self._host_group)

    def synchronize_buffers(self, model: nn.Module) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return the state of model and optimizer; if `holds_all` is False, it is whole on process 0 only."""
        state = super().state_dict(optimizer)
        if optimizer is not None and self._shards is not None:
            state["optimizer"] = merged(self._collect_one_by_one(state["optimizer"])[::-1])  # of two, that of process 0
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        super().load_state_dict(state)
        if optimizer is not None:
            elsewhere = () if self._shards is None else self._shards.elsewhere
            load_named_state(self._user_module, optimizer, state["optimizer"], elsewhere)

    def _collect_one_by_one(self, value: Any) -> list[Any]:
        """Return each process's `value` in rank order on process 0, which receives one at a time; else only its own."""
        values = [value]
        if self.rank != 0:
            dist.send_object_list(values, dst=0, group=self._host_group)
            return values
        for source in range(1, self.data_parallel_size):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=source, group=self._host_group)
            values += received
        return values


def _check_open_files(processes: int, rank: int, lazily: bool) -> None:
    """Raise UserError if this process may open too few files for its connections: to all, or `lazily` to few."""
    needed = SPARE_FILES + 2 * (2 * processes.bit_length() + 2 if lazily else processes - 1)
    needed += processes if rank == 0 else 0  # its host keeps the store
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"{processes} processes: expected at least {needed} open files for process {rank}, seen a limit of "
            f"{limit} (of {most}). Use ulimit -n {needed} before the start, on this host."
        )
