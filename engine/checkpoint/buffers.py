"""Buffers that a model's state_dict leaves out, or whose shape a run has changed, saved and restored to the bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.base import digest
from engine.errors import CheckpointError
from strategies import user_name


class UnsavedBuffers:
    """The buffers with `persistent=False`: part of a run's state if forward changes them, else the code's own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._at_start = {name: _digest(buffer) for name, buffer in self._buffers()}

    def changed(self) -> dict[str, Tensor | None]:
        """Return those that differ from the start of this process, by the user's own names."""
        missing = object()
        return {n: b for n, b in self._buffers() if _digest(b) != self._at_start.get(n, missing)}

    def load(self, saved: Mapping[str, Tensor | None], device: torch.device) -> None:
        """Give the model what `changed` returned. Raises CheckpointError for a module that it lacks."""
        modules = {user_name(name): module for name, module in self._model.named_modules()}
        for name, value in saved.items():
            path, _, last = name.rpartition(".")
            if path not in modules:
                raise CheckpointError(f"the checkpoint has the buffer {name!r}, and the model has no module {path!r}.")
            module = modules[path]
            current = module._buffers.get(last)
            if current is not None and _kind(value) == _kind(current) and not _is_elsewhere(module):
                current.copy_(value)  # other modules may share it
            elif not _is_elsewhere(module):
                module.register_buffer(last, None, persistent=False)
                module._buffers[last] = None if value is None else value.to(device, copy=True)

    def _buffers(self) -> Iterator[tuple[str, Tensor | None]]:
        for path, module in self._model.named_modules():
            for name in () if _is_elsewhere(module) else module._non_persistent_buffers_set:
                yield user_name(f"{path}.{name}" if path else name), module._buffers.get(name)


def take_shapes(model: nn.Module, saved: Mapping[str, Any], device: torch.device) -> None:
    """Give buffers the shapes and dtypes that they have in `saved`: forward may have changed them, as observers do."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            value = saved.get(user_name(f"{path}.{name}" if path else name))
            if isinstance(value, Tensor) and _kind(value) != _kind(buffer):
                module._buffers[name] = torch.zeros_like(value, device="meta" if _is_elsewhere(module) else device)


def _digest(buffer: Tensor | None) -> Any:
    """Return a value that changes with the bits of a dense buffer, and with each write to any other."""
    if buffer is None or buffer.layout != torch.strided or buffer.is_quantized:
        return buffer is None, id(buffer), -1 if buffer is None else buffer._version
    return _kind(buffer), digest(buffer)


def _kind(buffer: Tensor | None) -> Any:
    if buffer is None:
        return None
    is_expanded = buffer.layout is torch.strided and 0 in buffer.stride()  # nothing can be copied into it
    return buffer.shape, buffer.dtype, is_expanded


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether another process of a pipeline has the module."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
