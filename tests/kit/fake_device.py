"""A device that is not the CPU, in Python: memory of its own, waits of the host counted, streams that are late.

It refuses a tensor of the host among its own, and computes what the CPU would compute. Import it in a process of its
own: torch takes one such device, and from then on believes that there is an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
LOOKS = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.repeat_interleave.Tensor),
}
"""What returns a number to the host, or a shape that depends on values."""

waits: list[str] = []
"""Where the host has waited for the device."""


class OnFakeDevice(Tensor):
    """A tensor there; `raw` is its memory."""

    raw: Tensor

    def __new__(cls, raw: Tensor) -> OnFakeDevice:
        own: OnFakeDevice = Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device("fake", 0)
        )
        own.raw = raw
        return own

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernel(operator, *args, **(kwargs or {}))


def kernel(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operator: on the memory, by the CPU."""
    owners: dict[int, OnFakeDevice] = {}

    def memory(value: Any) -> Any:
        if isinstance(value, OnFakeDevice):
            owners[id(value.raw)] = value
            return value.raw
        if isinstance(value, Tensor) and value.ndim and operator not in COPIES:
            raise RuntimeError(
                f"{operator}: a tensor of shape {tuple(value.shape)} is on the host, others on the device"
            )
        return value

    raw_args, raw_kwargs = tree_map(memory, args), tree_map(memory, kwargs)
    from_host = operator is aten.copy_.default and args[1].is_cpu
    blocks = from_host and not (kwargs.get("non_blocking") or args[2:] == (True,))
    if from_host and not blocks and Stream.current.is_late:
        Stream.current.pending.append(lambda: raw_args[0].copy_(raw_args[1]))
        raw_args[0].fill_(-1)  # until then
        return args[0]
    to_host = _goes_to_host(operator, args, kwargs)
    if to_host or blocks or _looks(operator, args):
        waits.append(str(operator))
    if kwargs.get("device") is not None:
        raw_kwargs["device"] = torch.device("cpu")
    raw_kwargs.pop("pin_memory", None)
    with torch.no_grad():
        result = operator(*raw_args, **raw_kwargs)
    if to_host:
        return args[0] if operator is aten.copy_.default else result
    return tree_map_only(Tensor, lambda raw: owners[id(raw)] if id(raw) in owners else OnFakeDevice(raw), result)


def _goes_to_host(operator: Any, args: Any, kwargs: Any) -> bool:
    if operator is aten._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    return operator is aten.copy_.default and args[0].is_cpu


def _looks(operator: Any, args: Any) -> bool:
    if operator is aten.index.Tensor:  # by a mask
        return any(index is not None and index.dtype is torch.bool for index in args[1])
    return operator in LOOKS


class Stream:
    """All but the first copy to the device as late as they may."""

    current: Stream

    def __init__(self, device: Any = None, is_late: bool = True) -> None:
        self.is_late = is_late
        self.pending: list[Callable[[], Any]] = []
        self.done = 0

    def record_event(self) -> Callable[[], None]:
        """Return what does all that was asked for until now."""
        asked = self.done + len(self.pending)

        def happen() -> None:
            while self.done < asked:
                self.pending.pop(0)()
                self.done += 1

        return happen

    def wait_event(self, event: Callable[[], None]) -> None:
        event()

    def wait_stream(self, other: Stream) -> None:
        other.record_event()()


class Module(_DummyBackendModule):
    """`torch.fake`."""

    Stream = Stream

    def current_stream(self, device: Any = None) -> Stream:
        return Stream.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


Stream.current = Stream(is_late=False)
_setup_privateuseone_for_python_backend("fake", backend_module=Module())
_kernels = torch.library.Library("_", "IMPL")
_kernels.fallback(kernel, "PrivateUse1")
_kernels.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@torch.library.impl("aten::linear", "AutocastPrivateUse1")
def _linear(*tensors: Tensor | None) -> Tensor:
    """The one operator that autocast casts here."""
    dtype = torch.get_autocast_dtype("fake")
    with torch.autocast("fake", enabled=False):
        return nn.functional.linear(
            *(t.to(dtype) if t is not None and t.dtype is torch.float32 else t for t in tensors)
        )
