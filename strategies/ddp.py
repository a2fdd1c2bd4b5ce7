"""Several processes, each with the whole model: DistributedDataParallel, one reduction per window."""

from __future__ import annotations

import gc
import inspect
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from strategies.base import Rows, Strategy
from strategies.environment import notes, rendezvous, started_local_rank, started_processes, started_rank
from strategies.single import NOTHING_TO_DEFER

REFUSED = {
    "static_graph": "it records the first backward, and dies with an internal assert where that one is not "
    "synchronised (any window with K > 1). Use find_unused_parameters=True for parameters that are not always "
    "used, and non-reentrant activation checkpointing.",
    "delay_all_reduce_named_params": "it ignores no_sync, so gradients would be wrong without an error. Leave it out.",
    "mixed_precision": "gradients would not be accumulated in float32. Use Trainer(precision=...).",
}
"""Options of DistributedDataParallel that are wrong with deferred reduction (torch 2.13), and the way out."""


class DDPStrategy(Strategy):
    """Train one replica in each of P processes; gradients cross the wire once per window and bucket.

    gloo on CPU, NCCL on CUDA, started from torchrun's environment; a process group that exists is used and left in
    place. The options are those of `torch.nn.parallel.DistributedDataParallel`:

    - `find_unused_parameters`: for models that do not use each parameter in each micro-batch (costs a walk over the
      graph per window). Where it is False and a parameter was not used, the update raises instead of diverging.
    - `gradient_as_bucket_view`: gradients live in the buckets while there are any.
    - `bucket_cap_mb`: size of a bucket; smaller ones start earlier, larger ones are fewer.
    - `broadcast_buffers`: process 0's buffers (BatchNorm's statistics) go to all once per window.
    - `sync_batchnorm`: BatchNorm becomes `torch.nn.SyncBatchNorm` (CUDA only), which normalises over the micro-batches
      that the P processes have at a time. It communicates in every forward, so each window must have equally many
      micro-batches on all processes.

    `timeout_seconds` bounds every wait for another process (a download in `prepare_data` included), `device` is "cpu"
    or "cuda" (default: CUDA where there is one).
    """

    name = "ddp"
    supports_variable_windows = True

    def __init__(
        self,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        sync_batchnorm: bool = False,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
        **refused: object,
    ) -> None:
        for option in refused:
            if option in REFUSED:
                raise ValueError(f"DDPStrategy does not take {option}: {REFUSED[option]}")
            raise TypeError(f"DDPStrategy has no option {option!r}.")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds={timeout_seconds}: give the seconds that a collective may take.")
        self.find_unused_parameters = find_unused_parameters
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.broadcast_buffers = broadcast_buffers
        self.sync_batchnorm = sync_batchnorm
        self.timeout = timedelta(seconds=timeout_seconds)
        self._device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if sync_batchnorm and self._device_type == "cpu":
            raise ValueError(
                "sync_batchnorm=True: torch's SyncBatchNorm runs on GPUs only. On the CPU use GroupNorm or LayerNorm, "
                "or BatchNorm over each micro-batch (sync_batchnorm=False)."
            )
        self._backend = "nccl" if self._device_type == "cuda" else "gloo"
        self._owns_group = False
        self._host_group: dist.ProcessGroup | None = None
        self._notes: Any = None

    def effective_batch(self, N: int, K: int) -> int:
        """Return P x N x K."""
        return self.data_parallel_size * N * K

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return `no_sync` for all but the last micro-batch. DDP looks at it in forward, so that must be inside."""
        self._broadcast_buffers_once()
        return NOTHING_TO_DEFER if is_last_microbatch else self._ddp.no_sync()

    @property
    def rank(self) -> int:
        """This process in the group, or in torchrun's environment before there is one."""
        return dist.get_rank() if dist.is_initialized() else started_rank()

    @property
    def local_rank(self) -> int:
        """This process among those of its host."""
        return started_local_rank()

    @property
    def data_parallel_size(self) -> int:
        """P, all processes of the group."""
        return dist.get_world_size() if dist.is_initialized() else started_processes()

    @property
    def device(self) -> torch.device:
        """The CUDA device of this process's local rank, or the CPU."""
        return torch.device("cpu") if self._device_type == "cpu" else torch.device("cuda", self.local_rank)

    def describe(self) -> str:
        """Return one line for the banner."""
        backend = dist.get_backend() if dist.is_initialized() else self._backend
        return f"{self.name}: {self.data_parallel_size} x {self._device_type}, {backend}"

    def setup(self) -> None:
        """Join the processes: a group for gradients, and one on the CPU for messages."""
        if self._device_type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"process {self.local_rank} of this host has no GPU of its own: there are "
                    f"{torch.cuda.device_count()}. Start as many processes, or use DDPStrategy(device='cpu')."
                )
            torch.cuda.set_device(self.device)
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder: which collective hung
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        if not dist.is_initialized():
            self._owns_group = True
            store = rendezvous(self.timeout)
            dist.init_process_group(
                self._backend, timeout=self.timeout, store=store, rank=started_rank(), world_size=started_processes()
            )
        self._host_group = dist.new_group(backend="gloo", timeout=self.timeout)
        self._notes = notes()

    def teardown(self) -> None:
        """Destroy the groups that `setup` made."""
        if hasattr(self, "_ddp"):
            del self._ddp
            gc.collect()  # its hooks must be gone before the group that they use
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        elif self._host_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._host_group)
        self._owns_group, self._host_group, self._notes = False, None, None

    @property
    def needs_equal_windows(self) -> bool:
        """Whether the model has a SyncBatchNorm, and another process to wait for."""
        return self.data_parallel_size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in self._model.modules())

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap `model`, and fix the order in which its gradients are summed. Raises ValueError for a refused option."""
        if self.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self._ddp = self.wrap(super().prepare(model))
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._used: nn.Parameter | None = None  # one that is known to take part in forward
        self._has_buffers = any(True for _ in model.buffers())
        self._buffers_are_sent = self._was_called = False
        self._ddp.register_forward_pre_hook(self._note_call)
        if self._ddp.static_graph:
            raise ValueError(f"DDPStrategy does not take static_graph: {REFUSED['static_graph']}")
        if self._ddp._delay_all_reduce_params:
            reason = REFUSED["delay_all_reduce_named_params"]
            raise ValueError(f"DDPStrategy does not take delay_all_reduce_named_params: {reason}")
        self._fix_buckets()
        return self._ddp

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """Return `model` in DistributedDataParallel. Override it for an option that is not here, or to add a hook."""
        return DistributedDataParallel(
            model,
            device_ids=None if self._device_type == "cpu" else [self.device],
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **_buffers_are_ours(),
        )

    def backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Add `scale x d(loss)`: DDP averages over P, we promise the sum.

        Raises RuntimeError after the last micro-batch of a window where a gradient was not reduced.
        """
        if not self._was_called:
            raise ValueError("the loss was not computed with the `model` that loss() is given: call that one.")
        super().backward(loss, scale * self.data_parallel_size)
        if not self._ddp.require_backward_grad_sync:
            return
        self._buffers_are_sent = self._was_called = False
        if self.find_unused_parameters:
            if self._used is None:
                self._used = next((p for p in self._parameters if p.grad is not None), None)
            return
        try:
            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RuntimeError(self._unused_message(str(error))) from None

    def join(self, window: Any) -> None:
        """Reduce zeros: the wrapper's forward runs, as its collectives must, around a module that touches no data."""
        self._broadcast_buffers_once()
        trainable = [p for p in self._parameters if p.requires_grad]
        if self.find_unused_parameters:  # those unused everywhere must keep the gradient None
            trainable = [self._used if self._used is not None else trainable[0]]
        modules = self._ddp._modules
        modules["module"] = _Untouched(trainable)
        try:
            super().backward(self._ddp(), 1.0)
        finally:
            modules["module"] = self._model
        self._buffers_are_sent = self._was_called = False

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce `tensor` in place over the processes by "sum", "min" or "max"; return it."""
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def exchange(self, values: Sequence[float]) -> Rows:
        """Start one all-gather of a few doubles on the CPU group; call what comes back to wait and get all rows."""
        mine = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.data_parallel_size)]
        work = dist.all_gather(rows, mine, group=self._host_group, async_op=True)

        def wait() -> list[list[float]]:
            work.wait()
            return [row.tolist() for row in rows]

        return wait

    def gather(self, value: Any) -> list[Any]:
        """Return each process's `value` in rank order, by pickling it to the CPU group."""
        values: list[Any] = [None] * self.data_parallel_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def post(self, topic: str, text: str) -> None:
        """Put `text` into the store in which the processes met."""
        if self._notes is not None:
            _patiently(lambda: self._notes.set(f"{topic}/{self.rank}", text))

    def posted(self, topic: str) -> dict[int, str]:
        """Return the texts by rank; none where the store went with the process or the host that kept it."""
        found: dict[int, str] = {}

        def read() -> None:
            for rank in range(self.data_parallel_size):
                if self._notes.check([key := f"{topic}/{rank}"]):
                    found[rank] = self._notes.get(key).decode()

        if self._notes is not None:
            _patiently(read)
        return dict(found)

    def has_lost_contact(self, error: Exception) -> bool:
        """Whether `error` comes from the process group."""
        return isinstance(error, dist.DistError) or "gloo" in str(error)

    def barrier(self) -> None:
        """Wait for all processes, on the CPU group."""
        dist.barrier(group=self._host_group)

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of process 0."""
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load what `state_dict` returned; a parameter that has been stepped is one that takes part in forward."""
        super().load_state_dict(state, optimizer)
        if optimizer is not None:
            self._used = next((p for p in self._parameters if p in optimizer.state), None)

    def reductions(self) -> tuple[int, int]:
        """Return (buckets, bytes of all gradients): what one window sends, told by DDP's own reducer."""
        data = self._ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        buckets = [int(size) for size in str(sizes).split(",")]
        return len(buckets), sum(buckets)

    def bytes_to_reduce(self, model: nn.Module) -> int:
        """Return the bytes of all gradients: each is reduced once, in its own dtype."""
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def _fix_buckets(self) -> None:
        """Let DDP rebuild its buckets now.

        It does so in a process's second synchronised forward, so that a resumed process would sum its first window in
        another order than the run that was not interrupted: other bits, at P >= 3.
        """
        if not self.find_unused_parameters:
            self.join(None)
            self._ddp.reducer._rebuild_buckets()
            self.clear_gradients()

    def _broadcast_buffers_once(self) -> None:
        """Send process 0's buffers, once per window on every process, so that all begin it with those a checkpoint has.

        DDP would do so in each synchronised forward, of which processes may have different numbers: a model that is
        called twice in one loss, a process without a micro-batch, or one that failed.
        """
        if self._has_buffers and self.broadcast_buffers and not self._buffers_are_sent:
            self._buffers_are_sent = True
            self._ddp._sync_buffers()  # type: ignore[no-untyped-call]

    def _note_call(self, module: nn.Module, arguments: Any) -> None:
        self._was_called = True

    def _unused_message(self, reason: str) -> str:
        found = re.search(r"for rank \d+: ([\d ]+)", reason)
        unused = ", ".join(self._names[int(i)] for i in found[1].split()) if found else "some"
        return (
            f"process {self.rank}: the last micro-batch of the window did not use these parameters: {unused}. Their "
            "gradients were not reduced. Use DDPStrategy(find_unused_parameters=True) (--trainer.strategy="
            "strategies.DDPStrategy --trainer.strategy.find_unused_parameters=true)."
        )


class _Untouched(nn.Module):
    """A forward without data: zero, with gradient zero for the parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._held = tuple(parameters)  # not registered: they belong to the model

    def forward(self) -> Tensor:
        total = self._held[0].new_zeros(())
        for parameter in self._held:
            total = total + _Zero.apply(parameter)  # type: ignore[no-untyped-call]
        return total


class _Zero(torch.autograd.Function):
    """Zero, with gradient zero: `p.sum() * 0` would be NaN where a parameter is not finite."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


def _patiently(use_store: Callable[[], object], seconds: float = 3.0) -> None:
    """Use the store, but not for long: a host that is gone answers nothing, and TCP would wait for minutes."""

    def attempt() -> None:
        with suppress(RuntimeError):
            use_store()

    thread = threading.Thread(target=attempt, name="tally-notes", daemon=True)
    thread.start()
    thread.join(seconds)


def _buffers_are_ours() -> dict[str, Any]:
    """`broadcast_buffers=False` under the name that this torch wants (renamed in 2.13)."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}
