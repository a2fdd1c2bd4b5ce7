"""Private or new parts of torch, error texts of torch that are read, and what differs between its versions."""

import inspect
import re
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist

from strategies.errors import UserError

TESTED = "2.10 to 2.15"  # the tested versions of torch

# Used by `strategies.ddp.strategy`
DDP = (
    "torch._C._distributed_c10d:ProcessGroup._get_sequence_number_for_group",
    "torch._C._distributed_c10d:Reducer._get_local_used_map",
    "torch._C._distributed_c10d:Reducer._get_zeros_like_grad_buckets",
    "torch._C._distributed_c10d:Reducer._rebuild_buckets",
    "torch._C._distributed_c10d:Reducer._run_comm_hook",
    "torch._C._distributed_c10d:Reducer.prepare_for_backward",
    "torch.nn.parallel:DistributedDataParallel._check_reducer_finalized",
    "torch.nn.parallel:DistributedDataParallel._get_ddp_logging_data",
    "torch.nn.parallel:DistributedDataParallel._sync_buffers",
)

# Used by `strategies.fsdp.strategy` and `strategies.fsdp.collective_order`
FSDP = (
    "torch.distributed:_broadcast_coalesced",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._root_post_backward_final_callback",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.is_unsharded",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.post_backward",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.unshard",
)


def check_torch(name: str, parts: tuple[str, ...]) -> None:
    """Raise RuntimeError if this torch lacks one of `parts` ("module:attribute") that strategy `name` needs."""
    if missing := [part for part in parts if not _exists(part)]:
        raise RuntimeError(
            f"strategy {name!r} needs {', '.join(missing)}, which torch {torch.__version__} does not have. It is "
            f"tested with torch {TESTED}. Install one of them, or use another strategy."
        )


def ddp_options() -> dict[str, Any]:
    """Return `broadcast_buffers=False` of DDP, by the name that this torch has."""
    parameters = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


def reset_fsdp(root: Any) -> None:
    """Forget what forwards of the root FSDP module have left for a backward, and free what they have gathered."""
    if hasattr(root, "reset_iter_state"):  # torch 2.13
        root.reset_iter_state()
        return
    root_state = root._get_fsdp_state()
    for state in root_state._state_ctx.all_states:
        idle = type(state._training_state).IDLE
        state._modules_to_run_forward.clear()
        state._training_state = idle
        if (group := state._fsdp_param_group) is not None:
            group.finalize_backward()  # waits, and drops a gather that nobody used
            group._partial_reduce_output, group._training_state = None, idle
            group._to_sharded()
    root_state._comm_ctx.post_forward_order.clear()
    root_state._state_ctx.iter_forward_root = None
    root_state._state_ctx.post_backward_final_callback_queued = False


def has_gradient(parameter: Any) -> bool:
    """Whether one of FSDP's parameters has a gradient that is not reduced yet."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)


def reduce_unused(root: Any) -> None:
    """Let all processes reduce the same parameters, whichever they have used: see `complete_gradients` too."""
    if hasattr(root, "set_reduce_scatter_unused_params"):  # torch 2.13
        root.set_reduce_scatter_unused_params(True)


def complete_gradients(parameters: Any) -> None:
    """Give each of a unit's parameters a gradient, of one dtype, if this torch does not (2.15 does)."""
    parts = [p for p in parameters if hasattr(p, "_unsharded_param") and p._unsharded_param.requires_grad]
    if not parts or not hasattr(parts[0], "to_accumulated_grad_if_needed"):
        return
    for part in parts:
        if not has_gradient(part):
            part._unsharded_param.grad = torch.zeros_like(part._unsharded_param)
    waiting = [part for part in parts if part.unsharded_accumulated_grad is None]
    if len(waiting) < len(parts):
        for part in waiting:
            part.to_accumulated_grad_if_needed()


def end_fsdp_backward(root: Any) -> None:
    """End a backward of the root FSDP module that had no data."""
    state = root._get_fsdp_state()
    if hasattr(state._state_ctx, "manual_backward_finalization_active"):  # torch 2.15: set when a backward starts
        state._state_ctx.manual_backward_finalization_active = False
    state._root_post_backward_final_callback()


VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# Before it, a stage of a pipeline passes on floating-point numbers only, and fails if they have no gradient
IS_BEFORE_2_13 = VERSION < (2, 13)


def check_activations(dtypes: Sequence[torch.dtype]) -> None:
    """Raise UserError if a pipeline cannot pass on tensors of these dtypes."""
    for part, dtype in enumerate(dtypes):
        seen = f"part {part} of the pipeline returned {dtype}: expected"
        if dtype.is_complex:  # torch sends back no gradient of it
            raise UserError(f"{seen} real numbers. Set other boundaries, or pass on torch.view_as_real of it.")
        if IS_BEFORE_2_13 and not dtype.is_floating_point:
            way_out = "Set other boundaries, or use torch 2.13."
            raise UserError(f"{seen} floating-point numbers with torch {torch.__version__}. {way_out}")


def make_schedule(kind: Any, stage: Any, count: int) -> Any:
    """Return a pipeline's schedule of `count` micro-batches, whose loss the last stage has computed already."""
    least = stage.num_stages if VERSION < (2, 11) else 1  # torch 2.10 refuses fewer, though it runs them
    schedule = kind(stage, max(count, least), lambda loss, target: loss, scale_grads=False)
    schedule._n_microbatches = count
    return schedule


def expect_gradient(activation: torch.Tensor) -> None:
    """Give the input of a stage the gradient that it has if the loss does not depend on it."""
    if IS_BEFORE_2_13:
        activation.grad = torch.zeros_like(activation)


def is_lost_contact(error: Exception) -> bool:
    """Whether `error` comes from a process group: gloo raises a plain RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def is_freed_storage(error: Exception) -> bool:
    """Whether `error` comes from a backward that needs a parameter whose storage FSDP has freed."""
    return isinstance(error, RuntimeError) and "out of bounds for storage of size 0" in str(error)


def unused_parameters(error: RuntimeError) -> list[int]:
    """Return the indices of the trainable parameters that DDP's reducer names as unused; [] if it names none."""
    match = re.search(r"for rank \d+: ([\d ]+)", str(error))
    return [int(index) for index in match[1].split()] if match else []


def _exists(part: str) -> bool:
    try:
        resolve_name(part)
    except (ImportError, AttributeError):
        return False
    return True
