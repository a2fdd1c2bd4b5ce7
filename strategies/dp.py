"""Data parallelism in one process: each micro-batch is split over several devices in forward."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from strategies.errors import UserError, check_count
from strategies.single import SingleDeviceStrategy
from strategies.wrapper import ShowsModel

CPU_DEVICES = 2  # how many CPU "devices" split a batch if there is no CUDA and the user gives no number


class DPStrategy(SingleDeviceStrategy):
    """Split each micro-batch of N over `devices` devices of one process: `torch.nn.DataParallel` on CUDA.

    `devices` is their number (default: every CUDA device, or two on the CPU), `device_type` their type (default: CUDA
    if available). CPU "devices" run one after the other, so that a split batch can be tested on any machine. Only the
    first device's buffers (BatchNorm's statistics) are kept.
    """

    name = "dp"
    compiles_in_place = False

    def __init__(self, devices: int | None = None, device_type: Literal["cuda", "cpu"] | None = None) -> None:
        if device_type not in ("cuda", "cpu", None):
            raise UserError(f"device_type={device_type!r}: expected 'cuda' or 'cpu', or None for CUDA if available.")
        kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        available = torch.cuda.device_count() if kind == "cuda" else CPU_DEVICES
        if devices is not None:
            check_count("devices", devices)
        if kind == "cuda" and (devices or 1) > available:
            most = f"expected at most {available}, the CUDA devices of this host"
            raise UserError(f"devices={devices or 1}: {most}. Use device_type='cpu' to try it.")
        super().__init__("cuda:0" if kind == "cuda" else "cpu")
        self.devices = devices or available

    def describe(self) -> str:
        return f"{self.name}: each micro-batch split over {self.devices} {self.device.type} devices"

    def prepare(self, model: nn.Module) -> nn.Module:
        module = super().prepare(model)
        if self.device.type == "cuda":
            return _DataParallel(module, device_ids=list(range(self.devices)))
        return SplitOverCPU(module, self.devices)

    def seed(self, value: int) -> None:
        """Seed the generators of the CPU and of each CUDA device, each with another seed."""
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            for index in range(self.devices):
                torch.cuda.default_generators[index].manual_seed(value + index)


class _DataParallel(ShowsModel, nn.DataParallel[nn.Module]):
    """torch's DataParallel with the dtype of autocast, which its threads do not pass on."""

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Run each replica in a thread, under this thread's autocast."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def forward(replica: nn.Module, *args: Any, **named: Any) -> Any:
            with torch.autocast("cuda", dtype=dtype, enabled=enabled):
                return replica(*args, **named)

        casting: Any = [partial(forward, replica) for replica in replicas]  # torch only calls them
        return super().parallel_apply(casting, inputs, kwargs)


class SplitOverCPU(ShowsModel):
    """`torch.nn.DataParallel` on `chunks` CPU "devices", one after the other.

    They share the parameters; each but the first gets a copy of the buffers. Tensors are split by `torch.chunk` in
    dim 0, other values are passed to each. Outputs are concatenated in dim 0; 0-dim outputs become one element each.
    """

    def __init__(self, module: nn.Module, chunks: int) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.chunks = chunks
        self.__dict__["_is_built"] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the joined outputs of all chunks. Raises UserError for tensors of different sizes in dim 0."""
        shares = _split((args, kwargs), self.chunks)
        buffers = [{name: b.clone() for name, b in self.module.named_buffers()} for _ in shares[1:]]
        outputs = [self.module(*shares[0][0], **shares[0][1])]
        for (share_args, share_kwargs), copies in zip(shares[1:], buffers, strict=True):
            outputs.append(functional_call(self.module, copies, share_args, share_kwargs))
        return _join(outputs)


def _split(tree: Any, chunks: int) -> list[Any]:
    leaves, spec = tree_flatten(tree)
    split = {i: leaf.chunk(chunks) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim}
    shares = min((len(parts) for parts in split.values()), default=1)
    if any(len(parts) != shares for parts in split.values()):
        sizes = sorted({leaves[i].shape[0] for i in split})
        raise UserError(f"DP splits tensors in dim 0: expected equal sizes, got {sizes}. Pass others as attributes.")
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
