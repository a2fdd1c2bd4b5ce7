"""A model's buffers over time: copies of them at one moment, and the tensors that they are now."""

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of `model`, persistent or not, however forward changes them: in place, resized, or assigned."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module._buffers for module in model.modules()]
        self.exist = any(self._modules)  # whether the model registers a buffer
        self._kept: list[dict[str, Tensor | None]] = []
        self._copies: list[Tensor] = []
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def tensors(self) -> list[Tensor]:
        """Return those that are not None, in the order of the modules."""
        return [buffer for buffers in self._modules for buffer in buffers.values() if buffer is not None]

    def keep(self) -> None:
        """Copy them, into the copies of the time before if no shape has changed: that is faster."""
        self._kept = [buffers.copy() for buffers in self._modules]
        present = self.tensors()
        kinds = [(buffer.shape, buffer.dtype) for buffer in present]
        if kinds == self._kinds:
            try:
                torch._foreach_copy_(self._copies, present)
                return
            except (RuntimeError, NotImplementedError):  # sparse, for one
                pass
        self._copies, self._kinds = [buffer.detach().clone() for buffer in present], kinds

    def restore(self) -> None:
        """Give the model the buffers that were kept: the same tensors, with the same values."""
        copies = iter(zip(self._copies, self._kinds, strict=True))
        with torch.no_grad():
            for buffers, kept in zip(self._modules, self._kept, strict=False):
                for buffer in kept.values():
                    if buffer is None:
                        continue
                    copy, kind = next(copies)
                    is_expanded = 0 in buffer.stride() if buffer.layout is torch.strided else False
                    if (buffer.shape, buffer.dtype) == kind and not is_expanded:
                        buffer.copy_(copy)
                    else:
                        buffer.data = copy.clone()
                buffers.clear()
                buffers.update(kept)
