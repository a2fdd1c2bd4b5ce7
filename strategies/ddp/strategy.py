"""Distributed data parallelism: each process holds the whole model, and gradients are reduced once per window."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from strategies.ddp.compression import DTYPES, EXACT_TO, cast_and_reduce
from strategies.ddp.unfinished import SentBuckets
from strategies.ddp.wrapper import Wrapper, depends_on, zero_of
from strategies.errors import MODEL_NOT_CALLED, UserError
from strategies.optimizer_shards import OptimizerShards
from strategies.optimizer_state import user_name
from strategies.process_group import ProcessGroupStrategy
from strategies.torch_internals import DDP, ddp_options, unused_parameters

REFUSED = {
    "static_graph": "it records the first backward, and fails with an internal assert if that one is not "
    "synchronised (any window with K > 1). Use find_unused_parameters=True for parameters that are not always "
    "used, and non-reentrant activation checkpointing.",
    "delay_all_reduce_named_params": "it ignores no_sync, so gradients would be wrong without an error. Leave it out.",
    "mixed_precision": "gradients would not be accumulated in float32. Use Trainer(precision=...).",
}
"""Options of DistributedDataParallel that are wrong with deferred reduction (torch 2.13), and the way out."""
ANCHOR = "_unused_by_forward"
"""A parameter of one number, the model's only while it is wrapped: the use that a process without data makes of it."""


class DDPStrategy(ProcessGroupStrategy):
    """Train one replica in each of P processes; gradients cross the wire once per window and bucket.

    gloo on CPU, NCCL on CUDA, started from torchrun's environment; a process group that exists is used and left in
    place. The options are those of `torch.nn.parallel.DistributedDataParallel`:

    - `find_unused_parameters`: for models that do not use each parameter in each micro-batch (costs a walk over the
      graph per window). If it is False and a parameter was not used, the update raises instead of diverging.
    - `gradient_as_bucket_view`: gradients are views of the buckets, and are set to zero in place between updates. It
      saves memory of their size. With `find_unused_parameters` they become None instead: otherwise an optimizer would
      decay unused parameters.
    - `bucket_cap_mb`: size of a bucket; smaller ones start earlier, larger ones need fewer collectives.
    - `broadcast_buffers`: process 0's buffers (BatchNorm's statistics) go to all once per window. If it is False, each
      process has its own. A checkpoint holds those of process 0, so a resumed run differs if forward reads them.

    `communication_hook` sends gradients in fewer bytes, as approximations:

    - "fp16": half the bytes, relative error of the whole gradient 3e-4. Entries below 6e-5 have an absolute error of up
      to 3e-8. An entry above 65504 overflows, and all processes skip the update.
    - "bf16": half the bytes, relative error 3e-3, with the range of float32.

    For another hook, such as torch's PowerSGD, override `wrap` and register it there; set `exact_to = None`.

    `shard_optimizer` (ZeRO-1) divides the optimizer's state and steps among the processes by whole parameters, exactly.
    After each step the parameters are sent, so an update sends their bytes in addition. The optimizer must treat each
    parameter by itself. `trainer.optimizer` holds this process's share.

    `timeout_seconds` bounds every wait for another process (a download in `prepare_data` included), `device` is "cpu"
    or "cuda" (default: CUDA if available).
    """

    name = "ddp"
    supports_variable_windows = True
    supports_redo = True
    _torch_parts = DDP

    def __init__(
        self,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        communication_hook: Literal["fp16", "bf16"] | None = None,
        shard_optimizer: bool = False,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
        **refused: object,
    ) -> None:
        for option in refused:
            if option in REFUSED:
                raise _refusal(option)
            raise TypeError(f"DDPStrategy has no option {option!r}.")
        if communication_hook is not None and communication_hook not in DTYPES:
            what = f"communication_hook={communication_hook!r}: expected one of {', '.join(DTYPES)}, or None"
            raise UserError(f"{what}. To use another hook, override DDPStrategy.wrap and register it there.")
        super().__init__(timeout_seconds, device)
        self.find_unused_parameters = find_unused_parameters
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.broadcast_buffers = broadcast_buffers
        self.communication_hook = communication_hook
        if communication_hook is not None:
            self.exact_to = EXACT_TO[communication_hook]
        self.shard_optimizer = shard_optimizer
        self._keeps_buckets = gradient_as_bucket_view and not find_unused_parameters

    @contextmanager
    def accumulation_context(self, is_last_microbatch: bool) -> Iterator[None]:
        """Let DDP reduce in the last micro-batch only, as it reads in forward. No forward outside prepares that."""
        self._broadcast_buffers_once()
        self._ddp.require_backward_grad_sync = is_last_microbatch
        try:
            yield
        finally:
            self._ddp.require_backward_grad_sync = False

    def describe(self) -> str:
        hook = f", gradients sent in {self.communication_hook}" if self.communication_hook else ""
        return super().describe() + hook + (", optimizer sharded" if self.shard_optimizer else "")

    def release_model(self) -> None:
        self._hook = None
        if hasattr(self, "_ddp"):
            self._remove_reducer()
            del self._ddp
        super().release_model()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap `model`, and fix the order in which its gradients are summed. Raises UserError for a refused option."""
        super().prepare(model)
        self._has_buffers = any(True for _ in model.buffers())
        self._ddp = self._wrapped()
        self._fix_buckets()
        return self._ddp

    def start_window(self, most_micro_batches: int) -> None:
        """Wrap the model again if parameters were frozen or unfrozen: on all processes, else raises UserError."""
        if [p.requires_grad for p in self._parameters] == self._requires_grad:
            return
        self._agree_on_frozen()
        self.restart_reduction()

    def restart_reduction(self) -> None:
        """Wrap the model again: after a reduction that is unfinished, DDP refuses the next one."""
        super().clear_gradients()
        self._remove_reducer()
        wrapped = vars(self._wrapped())
        vars(self._ddp).clear()  # the same object stays: the engine and the task have it
        vars(self._ddp).update(wrapped)
        self._fix_buckets()

    def _wrapped(self) -> DistributedDataParallel:
        """Wrap the model, with a parameter of its own that `join` can use if others may be unused."""
        self._requires_grad = [p.requires_grad for p in self._parameters]
        trained = [p for p in self._parameters if p.requires_grad] or self._parameters
        self._anchor = nn.Parameter(trained[0].new_zeros(1))
        if self.find_unused_parameters:
            self._model.register_parameter(ANCHOR, self._anchor)
        try:
            ddp = self.wrap(self._model)
            self._names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        finally:
            self._model._parameters.pop(ANCHOR, None)
        self._buffers_are_sent = self._was_called = False
        self._sent = SentBuckets(is_exact=type(self).wrap is DDPStrategy.wrap)  # hooks of other wrappers are unknown
        ddp.register_forward_pre_hook(self._note_call)
        ddp.require_backward_grad_sync = False
        if ddp.static_graph:
            raise _refusal("static_graph")
        if ddp._delay_all_reduce_params:
            raise _refusal("delay_all_reduce_named_params")
        if self.communication_hook is not None:
            ddp.register_comm_hook(DTYPES[self.communication_hook], cast_and_reduce)
        return ddp

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """Return `model` in DistributedDataParallel. Override it for another option or communication hook."""
        return Wrapper(
            model,
            device_ids=None if self._device_type == "cpu" else [self.device],
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **ddp_options(),
        )

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        if self.shard_optimizer:
            self._shards = OptimizerShards(optimizer, dist.distributed_c10d._get_default_group())

    def backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Add `scale x d(loss)`, times P: DDP averages over P, and a strategy promises the sum.

        Raises after the last: UserError for a loss without the model, RuntimeError for a gradient that was not reduced.
        """
        is_last = self._ddp.require_backward_grad_sync
        if is_last:
            self._sent.begin()
        if is_last and not depends_on(loss, self._parameters):
            raise UserError(MODEL_NOT_CALLED)
        if is_last and (self.find_unused_parameters or not self._was_called):
            # forward does not know which of the model's methods and attributes the loss uses
            self._ddp.reducer.prepare_for_backward([loss] if self.find_unused_parameters else [])
        super().backward(loss, scale * self.data_parallel_size)
        if not is_last:
            return
        self._buffers_are_sent = self._was_called = False
        if self.find_unused_parameters:
            return
        try:
            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RuntimeError(self._unused_message(error)) from None

    def own_norm(self) -> Tensor | None:
        is_sum = self.defers_reduction and self.exact_to is not None
        return super().clip(None) / self.data_parallel_size if is_sum else None  # `backward` has multiplied by P

    def join(self, window: Any) -> None:
        """Reduce zeros: run the wrapper's forward, and so its collectives, around a function that reads no data."""
        self._broadcast_buffers_once()
        self._sent.begin()
        trainable = [p for p in self._parameters if p.requires_grad]
        if self.find_unused_parameters:  # parameters unused on all processes must keep the gradient None
            trainable = [self._anchor]
        modules: dict[str, Any] = self._ddp._modules
        modules["module"], self._ddp.require_backward_grad_sync = partial(zero_of, trainable), True
        try:
            super().backward(self._ddp(), 1.0)
        finally:
            modules["module"], self._ddp.require_backward_grad_sync = self._model, False
        self._buffers_are_sent = self._was_called = False

    def finish_reduction(self) -> bool:
        return self._sent.send_rest(self._ddp)

    def end_first_pass(self, has_output: bool) -> None:
        self._broadcast_buffers_once()  # a process without a micro-batch takes part

    def clear_gradients(self) -> None:
        """Set all gradients to None, or to zero if they are views of the buckets."""
        if self._keeps_buckets:
            torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
        else:
            super().clear_gradients()

    @property
    def holds_all(self) -> bool:
        return self._shards is None

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) of one window's gradients: DDP's buckets, in the dtype of the hook."""
        data = self._ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        buckets = [int(size) for size in str(sizes).split(",")]
        if self.communication_hook is not None:
            narrow = DTYPES[self.communication_hook].itemsize
            return len(buckets), sum(narrow * p.numel() for p in self._parameters if p.requires_grad)
        return len(buckets), sum(buckets)

    def bytes_to_reduce(self, model: nn.Module) -> int:
        """Return the bytes of all gradients: each is reduced once, in its own dtype."""
        sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        return sum(sizes) + (next(model.parameters()).element_size() if self.find_unused_parameters else 0)

    def _agree_on_frozen(self) -> None:
        """Raise UserError unless all processes have frozen and unfrozen the same parameters."""
        self._broadcast_buffers_once()
        rows = self.exchange([math.nan] * self.message_length)()
        before = zip(self._model.named_parameters(), self._requires_grad, strict=True)
        if not any(p.requires_grad for p in self._parameters):
            raise UserError("all parameters are frozen: expected one that requires grad. Leave one out.")
        changed = [user_name(name) for (name, p), required in before if p.requires_grad != required]
        # processes without a change are in their window, and take the message for one of a process that failed
        if not all(math.isnan(row[0]) for row in rows):
            for parameter, required in zip(self._parameters, self._requires_grad, strict=True):
                parameter.requires_grad_(required)
            self.join(None)
        what = f"requires_grad of {', '.join(changed[:3])} changed: expected the same on all processes. Change all."
        if len(set(self.gather(what + " ".join(changed[3:])))) > 1:
            raise UserError(f"process {self.rank}: {what}")

    def _remove_reducer(self) -> None:
        """Remove the reducer and its hooks now: an exception's frames may hold the wrapper longer than its group."""
        for part in ("reducer", "logger"):
            vars(self._ddp).pop(part, None)
        gc.collect()

    def _fix_buckets(self) -> None:
        """Make DDP rebuild its buckets now, and not in a process's second synchronised forward."""
        # a resumed process would sum its first window in another order than the uninterrupted run: other bits at P >= 3
        if not self.find_unused_parameters:
            self.join(None)
            super().clear_gradients()
            self._ddp.reducer._rebuild_buckets()
        if self._keeps_buckets:
            self.join(None)  # makes gradients of zero, views of the buckets

    def _broadcast_buffers_once(self) -> None:
        """Send process 0's buffers once per window. DDP would in each forward, and their number may differ."""
        if self._has_buffers and self.broadcast_buffers and not self._buffers_are_sent:
            self._buffers_are_sent = True
            self._ddp._sync_buffers()  # type: ignore[no-untyped-call]

    def _note_call(self, module: nn.Module, arguments: Any) -> None:
        self._was_called |= torch.is_grad_enabled() and self._ddp.require_backward_grad_sync

    def _unused_message(self, error: RuntimeError) -> str:
        unused = ", ".join(self._names[index] for index in unused_parameters(error)) or "unknown"
        return (
            f"process {self.rank}: the last micro-batch of the window did not use these parameters: {unused}. Their "
            "gradients were not reduced. Use DDPStrategy(find_unused_parameters=True) (--trainer.strategy="
            "strategies.DDPStrategy --trainer.strategy.find_unused_parameters=true)."
        )


def _refusal(option: str) -> UserError:
    return UserError(f"DDPStrategy does not take {option}: {REFUSED[option]}")
