"""The processes of one pipeline: what each holds of the model, and how a tensor goes through all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.pipeline.parts import PeerFailedError, TensorSpec

T = TypeVar("T")


@dataclass
class Chain:
    """One process's place in a pipeline, which is a ring: the parts are dealt out in turn."""

    parts: dict[int, nn.Module]
    """This process's, under their numbers in the model."""
    last: int
    """The number of the model's last part."""
    stage: int
    """This process in the pipeline, from 0."""
    ranks: list[int]
    """The pipeline's processes."""
    device: torch.device
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether the model begins here."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the model ends here."""
        return self.last in self.parts

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on all processes of the pipeline; return what each returned, in order.

        Raises what it raised here, and PeerFailedError where it raised on another.
        """
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

    def call(self, number: int, x: Tensor, autocast: torch.dtype | None) -> Any:
        """Return what a part gives. Raises ValueError where it is not one tensor, and does not end the model."""
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            output = self.parts[number](x)
        if number != self.last and not isinstance(output, Tensor):
            raise ValueError(
                f"part {number} of the pipeline ends with a {type(output).__name__}: one tensor passes to the next. "
                "Set boundaries between children where it does."
            )
        return output

    def through(self, x: Tensor | None, autocast: torch.dtype | None) -> tuple[Any, dict[int, TensorSpec]]:
        """Run one batch through all parts; return the model's output, on the last process, and what each part gave.

        `x` is None but on the first process. A part that fails raises when the batch has passed by; the output is None.
        """
        error, likes = None, {}
        for number in self.parts:
            if number > 0:
                x, autocast = self._receive()
            if x is not None and error is None:
                try:
                    x = self.call(number, x, autocast)
                except Exception as raised:
                    error = raised
            if error is not None:
                x = None
            if number < self.last:
                if x is not None:
                    likes[number] = TensorSpec(tuple(x.shape), x.dtype)
                self._send(x, autocast)
        if error is not None:
            raise error
        return x if self.is_last else None, likes

    def likes(self, x: Tensor | None, autocast: torch.dtype | None) -> list[TensorSpec]:
        """Return what each part gives for an input, from one forward without gradients that leaves no trace."""
        buffers = [buffer for part in self.parts.values() for buffer in part.buffers()]

        def run() -> dict[int, TensorSpec]:
            kept = [buffer.clone() for buffer in buffers]
            with torch.no_grad():
                likes = self.through(x, autocast)[1]
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
            return likes

        found = {number: like for likes in self.together(run) for number, like in likes.items()}
        return [
            *(found[number] for number in range(self.last)),
            TensorSpec((), torch.float32),
        ]  # the last gives the loss

    def _send(self, x: Tensor | None, autocast: torch.dtype | None) -> None:
        """Send a tensor of any shape, and how it is to be used, to the next process."""
        to = self.ranks[(self.stage + 1) % len(self.ranks)]
        what = None if x is None else (TensorSpec(tuple(x.shape), x.dtype), autocast)
        dist.send_object_list([what], dst=to, group=self.host_group)
        if x is not None:
            dist.send(x.contiguous(), dst=to, group=self.group)

    def _receive(self) -> tuple[Tensor | None, torch.dtype | None]:
        source = self.ranks[self.stage - 1]
        what: list[Any] = [None]
        dist.recv_object_list(what, src=source, group=self.host_group)
        if what[0] is None:
            return None, None
        like, autocast = what[0]
        x = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        dist.recv(x, src=source, group=self.group)
        return x, autocast
