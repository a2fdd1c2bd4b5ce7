"""Private or new parts of torch, and error texts of torch that are read, with the versions they are tested with."""

from __future__ import annotations

import re
from pkgutil import resolve_name

import torch
import torch.distributed as dist

TESTED = "2.13 and 2.15"  # the tested versions of torch

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

# Present since stages take the dtype of their outputs, which `strategies.pipeline.schedules` needs
PIPELINE = ("torch.distributed.pipelining._utils:InferenceMode",)

# Used by `strategies.fsdp.strategy` and `strategies.fsdp.collective_order`
FSDP = (
    "torch.distributed:_broadcast_coalesced",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp:FSDPModule.reset_iter_state",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms",
    "torch.distributed.fsdp:FSDPModule.set_reduce_scatter_unused_params",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._fsdp_param_group",
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
