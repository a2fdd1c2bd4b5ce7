"""The outputs of a window: those of each micro-batch, joined over all processes, and their gradients back."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.memory import free_memory
from engine.update.terms import LeftOut
from engine.window_task import Added, Output, Rows, Shared, widened
from strategies import MicroBatch, Strategy

Outputs = dict[str, Output]
Place = tuple[int, int, int]
"""The place of a micro-batch: its seed index, its process, and its index there. Sorted, they are in sample order."""

ALIGNMENT = 16  # bytes: an output of any dtype can begin there
CHECKED = 1 << 26  # bytes: for larger outputs the free memory is looked up


def check_outputs(outputs: Any, micro: MicroBatch) -> Outputs:
    """Return the outputs of a micro-batch. Raises UserError if a window cannot be joined of them."""
    if not isinstance(outputs, Mapping) or not outputs:
        raise UserError(f"outputs() returned {type(outputs).__name__}: expected a dict of Rows, Added or Shared.")
    if micro.size_problem:
        raise UserError(micro.size_problem)
    for name, output in outputs.items():
        if type(output) not in (Rows, Added, Shared) or not isinstance(output.tensor, Tensor):
            raise UserError(f"outputs()[{name!r}] is a {type(output).__name__}: expected Rows, Added or Shared.")
        if output.tensor.is_complex():
            raise UserError(f"outputs()[{name!r}] is complex: expected real numbers. Use torch.view_as_real.")
        shape = tuple(output.tensor.shape)
        if type(output) is Rows and shape[:1] != (micro.size,):
            raise UserError(f"outputs()[{name!r}] has shape {shape}: expected {micro.size} rows (samples), or Added.")
    if torch.is_grad_enabled() and not any(output.tensor.requires_grad for output in outputs.values()):
        raise UserError("no output requires grad. Compute them from the model, without detach() or no_grad().")
    return {name: outputs[name] for name in sorted(outputs)}  # in any order


def detached(outputs: Outputs) -> Outputs:
    """Return the outputs without their graph."""
    return {name: type(output)(output.tensor.detach()) for name, output in outputs.items()}


class JoinedOutputs:
    """The outputs of all micro-batches of a window, and the gradient of a loss with respect to each of them."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.bytes = 0  # the bytes of the outputs of the largest process in the last window

    def join(self, own: Mapping[int, Outputs] | None) -> bool:
        """Gather the outputs of all processes; `own` is None if this one failed. Return whether all have them."""
        rank, strategy = self._strategy.data_parallel_rank, self._strategy
        self._rank = rank
        tensors = [output.tensor.contiguous() for outputs in (own or {}).values() for output in outputs.values()]
        size = sum(_aligned(tensor) for tensor in tensors)
        layout = None if own is None else [(index, _layout(outputs)) for index, outputs in own.items()]
        rows = strategy.gather((layout, size, free_memory(strategy.device) if size > CHECKED else math.inf))
        if any(layout is None for layout, _, _ in rows):
            return False
        self.bytes, free = max(size for _, size, _ in rows), min(free for *_, free in rows)
        if self.bytes * len(rows) * 3 > free:  # gathered, concatenated, and their gradients
            needed = f"{self.bytes * len(rows) * 3 / 2**30:.1f} GiB on each process"
            raise UserError(
                f"window_loss() of this window needs {needed}: expected at most the free {free / 2**30:.1f} GiB. Use a "
                "smaller window, or smaller outputs."
            )
        layouts = [layout for layout, _, _ in rows]
        _check_layouts(layouts)
        packed = strategy.gather_bytes(_packed(tensors, size, strategy.device), self.bytes)
        self._parts: dict[str, dict[Place, Tensor]] = {}
        self._kinds: dict[str, str] = {}
        for process, (layout, data) in enumerate(zip(layouts, packed, strict=True)):
            start = 0
            for count, (index, outputs) in enumerate(layout):
                for name, kind, dtype, shape in outputs:
                    length = math.prod(shape) * dtype.itemsize
                    part = data[start : start + length].view(dtype).view(shape)
                    self._parts.setdefault(name, {})[index, process, count] = part
                    self._kinds[name] = kind
                    start += _aligned(part)
        self._parts = {name: dict(sorted(parts.items())) for name, parts in self._parts.items()}
        return True

    def gradients(
        self, window_loss: Callable[[Mapping[str, Tensor]], Tensor], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the loss of the window, and its gradients by micro-batch and name. Raises UserError for a bad loss."""
        parts = {name: [widened(part).detach() for part in places.values()] for name, places in self._parts.items()}
        for part in chain(*parts.values()):
            part.requires_grad_(part.is_floating_point())
        with torch.enable_grad():
            loss = window_loss({name: self._joined(name, parts[name]) for name in parts})
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.ndim else type(loss).__name__
            raise UserError(f"window_loss() returned {what}: expected a 0-dim tensor computed from the outputs.")
        own = [
            (count, name, part)
            for name, places in self._parts.items()
            for (_, process, count), part in zip(places, parts[name], strict=True)
            if process == self._rank and part.requires_grad
        ]
        held = [p for p in parameters if p.requires_grad]
        found = torch.autograd.grad(loss, [*(part for *_, part in own), *held], allow_unused=True)
        if any(gradient is not None for gradient in found[len(own) :]):
            raise UserError(
                "window_loss() uses a parameter of the model by itself, which would lose that gradient. Return it from "
                "outputs() as Shared."
            )
        gradients: dict[int, dict[str, Tensor]] = {}
        for (count, name, _), gradient in zip(own, found, strict=False):
            if gradient is not None:
                gradients.setdefault(count, {})[name] = gradient
        return loss.detach(), [gradients[count] for count in sorted(gradients)]

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        if self._kinds[name] == "Rows":
            return torch.cat(parts)
        stacked = torch.stack(parts)
        if self._kinds[name] == "Added":
            return stacked.sum(0)
        if ((stacked != stacked[0]) & ~stacked.isnan()).any():
            raise UserError(f"outputs()[{name!r}] is Shared and differs between micro-batches. Use Rows or Added.")
        return stacked[0]


def differences(first: Outputs, second: Outputs) -> Tensor:
    """Return, on the device, whether two forwards of a micro-batch differ by more than rounding."""
    found = []
    for name, output in first.items():
        a, b = output.tensor, second[name].tensor.detach()
        if a.shape != b.shape:
            found.append(torch.ones((), dtype=torch.bool, device=a.device))
        elif not a.is_floating_point():
            found.append((a != b).any())
        elif a.numel():
            scale = torch.finfo(a.dtype).eps ** 0.5
            bound = scale * a.abs().nan_to_num(0.0, 0.0, 0.0).max()
            found.append((((a - b).abs() > bound) & (a - b).isfinite()).any())
    return torch.stack(found).any()


def surrogate(outputs: Outputs, gradients: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return a 0-dim tensor whose gradient with respect to each output is `scale` times the given one."""
    terms = [
        (outputs[name].tensor.to(gradient.dtype) * (gradient * scale if scale != 1.0 else gradient)).sum()
        for name, gradient in gradients.items()
        if outputs[name].tensor.requires_grad
    ]
    if not terms:
        raise UserError("window_loss() depends on no output that requires grad. Compute it from one that does.")
    unused = (outputs[name].tensor for name in outputs.keys() - gradients)
    terms += [LeftOut.apply(tensor) for tensor in unused if tensor.requires_grad]
    return torch.stack(terms).sum() if len({term.dtype for term in terms}) == 1 else sum(terms[1:], terms[0])


def _layout(outputs: Outputs) -> list[tuple[str, str, torch.dtype, tuple[int, ...]]]:
    return [(n, type(out).__name__, out.tensor.dtype, tuple(out.tensor.shape)) for n, out in outputs.items()]


def _check_layouts(layouts: Sequence[Sequence[tuple[int, Any]]]) -> None:
    """Raise UserError unless all micro-batches have outputs of the same names, kinds, dtypes and row shapes."""
    seen: tuple[int, Any] | None = None
    for rank, layout in enumerate(layouts):
        for _, outputs in layout:
            facts = [(n, k, str(d), shape[1:] if k == "Rows" else shape) for n, k, d, shape in outputs]
            if seen is None:
                seen = rank, facts
            elif facts != seen[1]:
                differing = [f"{a} and {b}" for a, b in zip(seen[1], facts, strict=False) if a != b]
                what = differing[0] if differing else f"{[f[0] for f in seen[1]]} and {[f[0] for f in facts]}"
                raise UserError(
                    f"outputs() differ between micro-batches (processes {seen[0]} and {rank}): {what}. Return the same "
                    "names, kinds, dtypes and row shapes for each."
                )


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _packed(tensors: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    packed, start = torch.zeros(size, dtype=torch.uint8, device=device), 0
    for tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        packed[start : start + length] = tensor.reshape(-1).view(torch.uint8)
        start += _aligned(tensor)
    return packed
