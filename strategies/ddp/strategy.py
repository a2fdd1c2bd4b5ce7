"""Several processes, each with the whole model: DistributedDataParallel, one reduction per window."""

from __future__ import annotations

import gc
import inspect
import re
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from strategies.ddp.compression import EXACT_TO, Hook, check_hook, make_hook
from strategies.ddp.empty_forward import EmptyForward
from strategies.ddp.zero1 import OptimizerShards
from strategies.optimizer_state import load_named_state, merged, parameter_names
from strategies.process_group import ProcessGroupStrategy
from strategies.single import NOTHING_TO_DEFER
from strategies.torch_internals import DDP

REFUSED = {
    "static_graph": "it records the first backward, and dies with an internal assert where that one is not "
    "synchronised (any window with K > 1). Use find_unused_parameters=True for parameters that are not always "
    "used, and non-reentrant activation checkpointing.",
    "delay_all_reduce_named_params": "it ignores no_sync, so gradients would be wrong without an error. Leave it out.",
    "mixed_precision": "gradients would not be accumulated in float32. Use Trainer(precision=...).",
}
"""Options of DistributedDataParallel that are wrong with deferred reduction (torch 2.13), and the way out."""


class DDPStrategy(ProcessGroupStrategy):
    """Train one replica in each of P processes; gradients cross the wire once per window and bucket.

    gloo on CPU, NCCL on CUDA, started from torchrun's environment; a process group that exists is used and left in
    place. The options are those of `torch.nn.parallel.DistributedDataParallel`:

    - `find_unused_parameters`: for models that do not use each parameter in each micro-batch (costs a walk over the
      graph per window). Where it is False and a parameter was not used, the update raises instead of diverging.
    - `gradient_as_bucket_view`: gradients live in the buckets, and are set to zero in place between updates, which
      saves memory of their size. (Not with `find_unused_parameters`: there they must become None between updates, or
      an optimizer would decay parameters that nobody used.)
    - `bucket_cap_mb`: size of a bucket; smaller ones start earlier, larger ones are fewer.
    - `broadcast_buffers`: process 0's buffers (BatchNorm's statistics) go to all once per window.
    - `sync_batchnorm`: BatchNorm becomes `torch.nn.SyncBatchNorm` (CUDA only), which normalises over the micro-batches
      that the P processes have at a time. It communicates in every forward, so each window must have equally many
      micro-batches on all processes.

    Gradients may cross the wire in fewer bytes, as approximations. `communication_hook` is one of

    - "fp16": half the bytes, 3e-4 off (relative, of the whole gradient). Entries below 6e-5 are held to 3e-8; one above
      65504 overflows, and the update is skipped on all processes.
    - "bf16": half the bytes, 3e-3 off, with the range of float32.
    - "powersgd": two matrices of `powersgd_rank` columns for each large matrix of gradients, after `powersgd_start`
      updates that are sent whole. Far off in each update, but what is lost is kept and added to the next. Each process
      keeps as much as its gradients for that, and a checkpoint holds it of all P.

    `shard_optimizer` (ZeRO-1) divides the optimizer's state and steps among the processes by whole parameters, exactly:
    after each step the parameters are sent, so an update sends that many bytes more. For optimizers that treat each
    parameter by itself. Afterwards `trainer.optimizer` holds this process's share.

    `timeout_seconds` bounds every wait for another process (a download in `prepare_data` included), `device` is "cpu"
    or "cuda" (default: CUDA where there is one).
    """

    name = "ddp"
    supports_variable_windows = True
    _torch_parts = DDP

    def __init__(
        self,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        sync_batchnorm: bool = False,
        communication_hook: Literal["fp16", "bf16", "powersgd"] | None = None,
        powersgd_rank: int = 1,
        powersgd_start: int = 1000,
        shard_optimizer: bool = False,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
        **refused: object,
    ) -> None:
        for option in refused:
            if option in REFUSED:
                raise ValueError(f"DDPStrategy does not take {option}: {REFUSED[option]}")
            raise TypeError(f"DDPStrategy has no option {option!r}.")
        check_hook(communication_hook, powersgd_rank, powersgd_start)
        super().__init__(timeout_seconds, device)
        self.find_unused_parameters = find_unused_parameters
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.broadcast_buffers = broadcast_buffers
        self.sync_batchnorm = sync_batchnorm
        self.communication_hook = communication_hook
        if communication_hook is not None:
            self.exact_to = EXACT_TO[communication_hook]
        self.powersgd_rank = powersgd_rank
        self.powersgd_start = powersgd_start
        self.shard_optimizer = shard_optimizer
        self._hook: Hook | None = None
        self._shards: OptimizerShards | None = None
        self._keeps_buckets = gradient_as_bucket_view and not find_unused_parameters
        if sync_batchnorm and self._device_type == "cpu":
            raise ValueError(
                "sync_batchnorm=True: torch's SyncBatchNorm runs on GPUs only. On the CPU use GroupNorm or LayerNorm, "
                "or BatchNorm over each micro-batch (sync_batchnorm=False)."
            )

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return `no_sync` for all but the last micro-batch. DDP looks at it in forward, so that must be inside."""
        self._broadcast_buffers_once()
        return NOTHING_TO_DEFER if is_last_microbatch else self._ddp.no_sync()

    def describe(self) -> str:
        """Return one line for the banner."""
        hook = f", gradients sent by {self.communication_hook}" if self.communication_hook else ""
        return super().describe() + hook + (", optimizer sharded" if self.shard_optimizer else "")

    def teardown(self) -> None:
        """Destroy the groups that `setup` made."""
        if self._shards is not None:
            self._shards.remove()
        self._shards = self._hook = None
        if hasattr(self, "_ddp"):
            for part in ("reducer", "logger"):  # an exception's frames may hold the wrapper, and free it too late
                vars(self._ddp).pop(part, None)
            del self._ddp
            gc.collect()  # its hooks must be gone before the group that they use
        super().teardown()

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
        self._hook = make_hook(self.communication_hook, self.powersgd_rank, self.powersgd_start)
        if self._hook is not None:
            self._ddp.register_comm_hook(None, self._hook.reduce)
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

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Divide the steps of `optimizer` among the processes, if so wanted, and let a hook know of them."""
        if self.shard_optimizer:
            self._shards = OptimizerShards(optimizer, self.rank, self.data_parallel_size)
        if self._hook is not None:
            optimizer.register_step_post_hook(self._note_update)

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
        modules["module"] = EmptyForward(trainable)
        try:
            super().backward(self._ddp(), 1.0)
        finally:
            modules["module"] = self._model
        self._buffers_are_sent = self._was_called = False

    def clear_gradients(self) -> None:
        """Set all gradients to None, or to zero where they live in the buckets."""
        if self._keeps_buckets:
            torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
        else:
            super().clear_gradients()

    @property
    def holds_all(self) -> bool:
        """Whether nothing is divided among the processes, and nothing is kept that differs between them."""
        return self._shards is None and not (self._hook is not None and self._hook.keeps_state)

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return model, optimizer and what a hook keeps; where `holds_all` is False, whole on process 0."""
        state = super().state_dict(optimizer)
        if optimizer is not None and self._shards is not None:
            state["optimizer"] = merged(self.collect(state["optimizer"]))
        if optimizer is not None and self._hook is not None and self._hook.keeps_state:
            state["strategy"] = self.collect(self._hook.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load what `state_dict` returned; a parameter that has been stepped is one that takes part in forward."""
        super().load_state_dict(state, None)
        if optimizer is not None:
            elsewhere = self._shards.elsewhere if self._shards is not None else ()
            load_named_state(self._user_module, optimizer, state["optimizer"], elsewhere)
            stepped = state["optimizer"]["state"]
            names = parameter_names(self._user_module)
            self._used = next((p for p in self._parameters if names[p] in stepped), None)
        if self._hook is not None and self._hook.keeps_state and state.get("strategy"):
            self._hook.load_state_dict(state["strategy"], self.rank, self.device)

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) of one window's gradients: told by DDP's own reducer, or by the hook."""
        if self._hook is not None:
            return self._hook.reductions
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
            super().clear_gradients()
            self._ddp.reducer._rebuild_buckets()
        if self._keeps_buckets:
            self.join(None)  # gradients of zero, which live in the buckets

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

    def _note_update(self, optimizer: Optimizer, arguments: Any, named: Any) -> None:
        if self._hook is not None:
            self._hook.commit()

    def _unused_message(self, reason: str) -> str:
        found = re.search(r"for rank \d+: ([\d ]+)", reason)
        unused = ", ".join(self._names[int(i)] for i in found[1].split()) if found else "some"
        return (
            f"process {self.rank}: the last micro-batch of the window did not use these parameters: {unused}. Their "
            "gradients were not reduced. Use DDPStrategy(find_unused_parameters=True) (--trainer.strategy="
            "strategies.DDPStrategy --trainer.strategy.find_unused_parameters=true)."
        )


def _buffers_are_ours() -> dict[str, Any]:
    """`broadcast_buffers=False` under the name that this torch wants (renamed in 2.13)."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}
