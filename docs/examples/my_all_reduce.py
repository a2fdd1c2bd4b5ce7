"""A strategy from nothing but `Strategy` and collectives: it overlaps nothing. Unused parameters get gradient 0."""

from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from strategies import Strategy
from strategies.environment import rendezvous, started_processes, started_rank


class AllReduce(Strategy):
    """One replica in each of P processes, and one all-reduce of all gradients after a window's last backward."""

    name = "all-reduce"
    supports_variable_windows = True

    def __init__(self, timeout_seconds: float = 300.0) -> None:
        self.timeout = timedelta(seconds=timeout_seconds)

    def effective_batch(self, N: int, K: int) -> int:
        return self.data_parallel_size * N * K

    def accumulation_context(self, is_last_microbatch: bool):
        self._is_last = is_last_microbatch  # for `backward`
        return nullcontext()

    # Processes: known before there is a group

    @property
    def rank(self) -> int:
        return started_rank()

    @property
    def data_parallel_size(self) -> int:
        return started_processes()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def setup(self) -> None:
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            place = {"rank": started_rank(), "world_size": started_processes()}
            dist.init_process_group("gloo", store=rendezvous(self.timeout), timeout=self.timeout, **place)
        self._messages = dist.new_group(backend="gloo", timeout=self.timeout)  # they must not wait for gradients

    def teardown(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(None if self._owns_group else self._messages)

    # One window

    def prepare(self, model):
        prepared = super().prepare(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        return prepared

    def backward(self, loss, scale) -> None:
        super().backward(loss, scale)
        if self._is_last:
            self.join(None)

    def join(self, window) -> None:
        trained = [p for p in self._parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)

    def reductions(self) -> tuple[int, int]:
        return 1, sum(p.numel() * p.element_size() for p in self._parameters if p.requires_grad)

    # Between processes

    def all_reduce(self, tensor, op: str = "sum"):
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def exchange(self, values):
        mine = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.data_parallel_size)]
        work = dist.all_gather(rows, mine, group=self._messages, async_op=True)

        def wait() -> list[list[float]]:
            work.wait()
            return [row.tolist() for row in rows]

        return wait

    def gather(self, value):
        values = [None] * self.data_parallel_size
        dist.all_gather_object(values, value, group=self._messages)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self._messages)

    def synchronize_buffers(self, model) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def has_lost_contact(self, error: Exception) -> bool:
        return isinstance(error, dist.DistError) or "gloo" in str(error)
