"""Parts of torch that are private, or newer than the oldest torch that can be installed with Tally."""

from __future__ import annotations

from pkgutil import resolve_name

import torch

TESTED = "2.13 and 2.15"
"""The versions of torch with which all of them are tested."""

DDP = (
    "torch._C._distributed_c10d:Reducer._rebuild_buckets",
    "torch.nn.parallel:DistributedDataParallel._check_reducer_finalized",
    "torch.nn.parallel:DistributedDataParallel._get_ddp_logging_data",
    "torch.nn.parallel:DistributedDataParallel._sync_buffers",
)
"""What `strategies.ddp.strategy` uses."""

PIPELINE = ("torch.distributed.pipelining._utils:InferenceMode",)
"""Came with what `strategies.pipeline.schedules` needs: stages whose outputs have the dtype that they are told."""

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
"""What `strategies.fsdp.strategy` and `strategies.fsdp.collective_order` use."""


def check_torch(name: str, parts: tuple[str, ...]) -> None:
    """Raise RuntimeError where this torch lacks one of `parts`, "module:attribute" each, that strategy `name` needs."""
    if missing := [part for part in parts if not _exists(part)]:
        raise RuntimeError(
            f"strategy {name!r} needs {', '.join(missing)}, which torch {torch.__version__} does not have. It is "
            f"tested with torch {TESTED}: install one of them, or use another strategy."
        )


def _exists(part: str) -> bool:
    try:
        resolve_name(part)
    except (ImportError, AttributeError):
        return False
    return True
