"""The processes of one pipeline: each holds one part of the model, and a tensor passes through them in order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.buffers import Buffers
from strategies.errors import UserError
from strategies.pipeline.parts import PeerFailedError, TensorSpec

T = TypeVar("T")


@dataclass
class Chain:
    """One process of a pipeline, and its neighbours."""

    part: nn.Module  # this process's part of the model
    stage: int  # the index of this process in the pipeline, and of its part in the model
    ranks: list[int]  # the pipeline's processes
    device: torch.device
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether the model begins in this process."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the model ends in this process."""
        return self.stage == len(self.ranks) - 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on each process, in order. Raises PeerFailedError if it raised on another."""
        error, value = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        rows = self.gather((error is None, value))
        if error is not None:
            raise error
        if not all(is_good for is_good, _ in rows):
            raise PeerFailedError
        return [value for _, value in rows]

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of each process of the pipeline, in order."""
        rows: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(rows, value, group=self.host_group)
        return rows

    def call(self, x: Tensor, autocast: torch.dtype | None) -> Any:
        """Return the output of this part. Raises UserError unless it is one tensor, except in the last part."""
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            output = self.part(x)
        if not self.is_last and not isinstance(output, Tensor):
            seen = f"part {self.stage} of the pipeline returned {type(output).__name__}"
            raise UserError(f"{seen}: expected one tensor. Set boundaries between children that pass one tensor.")
        return output

    def through(self, x: Tensor | None, autocast: torch.dtype | None) -> tuple[Any, TensorSpec | None]:
        """Run a batch `x` of the first process through all parts. Return the output (on the last) and this spec."""
        error = spec = None
        if not self.is_first:
            x, autocast = self._receive()
        if x is not None:
            try:
                x = self.call(x, autocast)
            except Exception as raised:
                error, x = raised, None
        if not self.is_last:
            if x is not None:
                spec = TensorSpec(tuple(x.shape), x.dtype)
            self._send(x, spec, autocast)
        if error is not None:
            raise error
        return x if self.is_last else None, spec

    def specs(self, x: Tensor | None, autocast: torch.dtype | None) -> list[TensorSpec]:
        """Return the spec of each part's output for an input, by one forward without gradients or other effects."""

        def run() -> TensorSpec | None:
            buffers = Buffers(self.part)
            buffers.keep()
            with torch.no_grad():
                spec = self.through(x, autocast)[1]
            buffers.restore()
            return spec

        specs = self.together(run)[:-1]
        return [*(spec for spec in specs if spec is not None), TensorSpec((), torch.float32)]  # the last is the loss

    def _send(self, x: Tensor | None, spec: TensorSpec | None, autocast: torch.dtype | None) -> None:
        target = self.ranks[self.stage + 1]
        dist.send_object_list([(spec, autocast)], dst=target, group=self.host_group)
        if x is not None:
            dist.send(x.contiguous(), dst=target, group=self.group)

    def _receive(self) -> tuple[Tensor | None, torch.dtype | None]:
        source = self.ranks[self.stage - 1]
        header: list[Any] = [None]
        dist.recv_object_list(header, src=source, group=self.host_group)
        spec, autocast = header[0]
        if spec is None:
            return None, None
        x = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        dist.recv(x, src=source, group=self.group)
        return x, autocast
