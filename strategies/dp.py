"""One process, several devices: each micro-batch is split over them in forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from strategies.single import SingleDeviceStrategy

CPU_DEVICES = 2
"""How many CPU "devices" split a batch where there is no CUDA and the user names no number."""


class DPStrategy(SingleDeviceStrategy):
    """Split each micro-batch of N over `devices` devices of one process: `torch.nn.DataParallel` on CUDA.

    `devices` is a number of them (default: every CUDA device, or two on the CPU) and `device_type` their kind (default:
    CUDA where there is any). Several CPU "devices" are really used, one after the other: what a batch that is split
    does to a model can so be tried, and tested, on any machine. `torch.nn.DataParallel` itself passes through silently
    on the CPU.

    As everywhere under data parallelism, only the first device's buffers (BatchNorm's statistics) are kept.
    """

    name = "dp"
    compiles_in_place = False

    def __init__(self, devices: int | None = None, device_type: Literal["cuda", "cpu"] | None = None) -> None:
        if device_type not in ("cuda", "cpu", None):
            raise ValueError(f"device_type={device_type!r}: give 'cuda' or 'cpu', or None for CUDA where there is any.")
        kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        found = torch.cuda.device_count() if kind == "cuda" else CPU_DEVICES
        if devices is not None and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
            raise ValueError(f"devices={devices!r}: give the number of devices that split a batch, 1 or more.")
        if kind == "cuda" and (devices or 1) > found:
            raise ValueError(
                f"devices={devices or 1}: there are {found} CUDA devices here; use device_type='cpu' to try it out."
            )
        super().__init__("cuda:0" if kind == "cuda" else "cpu")
        self.devices = devices or found

    def effective_batch(self, N: int, K: int) -> int:
        """Return N x K: the batch of N is split over the devices, not repeated on each."""
        return N * K

    def describe(self) -> str:
        """Return one line for the banner."""
        return f"{self.name}: each micro-batch split over {self.devices} {self.device.type} devices"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move `model` to the first device and return the wrapper that splits its batches."""
        module = super().prepare(model)
        if self.device.type == "cuda":
            return _DataParallel(module, device_ids=list(range(self.devices)))
        return SplitOverCPU(module, self.devices)

    def seed(self, value: int) -> None:
        """Seed the generators of the CPU and of each CUDA device, which draw differently from one another."""
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            for index in range(self.devices):
                torch.cuda.default_generators[index].manual_seed(value + index)


class _DataParallel(nn.DataParallel[nn.Module]):
    """Its threads know whether autocast is on, but not to which dtype: enter it anew in each replica."""

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Run each replica in a thread, under this thread's autocast."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def casting(replica: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **named: Any) -> Any:
                with torch.autocast("cuda", dtype=dtype, enabled=enabled):
                    return replica(*args, **named)

            return forward

        casting_replicas: Any = [casting(replica) for replica in replicas]  # all that torch does is call them
        return super().parallel_apply(casting_replicas, inputs, kwargs)


class SplitOverCPU(nn.Module):
    """What `torch.nn.DataParallel` does, on `chunks` CPU "devices" that take turns.

    They share the parameters, so gradients add up as they should; each but the first gets buffers of its own. Tensors
    are split in dim 0 as DataParallel splits them (`torch.chunk`: fewer chunks for a small batch), anything else is
    passed to each; outputs are concatenated in dim 0, and 0-dim outputs become one element each.
    """

    def __init__(self, module: nn.Module, chunks: int) -> None:
        super().__init__()
        self.module = module
        self.chunks = chunks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of all chunks, as of one batch."""
        shares = _split((args, kwargs), self.chunks)
        buffers = [{name: b.clone() for name, b in self.module.named_buffers()} for _ in shares[1:]]
        outputs = [self.module(*shares[0][0], **shares[0][1])]
        for (share_args, share_kwargs), own in zip(shares[1:], buffers, strict=True):
            outputs.append(functional_call(self.module, own, share_args, share_kwargs))
        return _join(outputs)


def _split(tree: Any, chunks: int) -> list[Any]:
    leaves, spec = tree_flatten(tree)
    split = {i: leaf.chunk(chunks) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim}
    shares = min((len(parts) for parts in split.values()), default=1)
    if any(len(parts) != shares for parts in split.values()):
        sizes = sorted({leaves[i].shape[0] for i in split})
        raise ValueError(
            f"DP splits every tensor in dim 0, but their sizes there differ: {sizes}. Pass others by attribute."
        )
    return [
        tree_unflatten([split[i][share] if i in split else leaf for i, leaf in enumerate(leaves)], spec)
        for share in range(shares)
    ]


def _join(outputs: list[Any]) -> Any:
    def join(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        return torch.cat([part if part.ndim else part.reshape(1) for part in parts])

    return outputs[0] if len(outputs) == 1 else tree_map(join, outputs[0], *outputs[1:])
