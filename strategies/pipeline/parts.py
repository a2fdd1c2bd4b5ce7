"""The parts of a model: the cut, the model that `loss()` calls, and the specs of the tensors between parts."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from strategies.errors import MODEL_NOT_CALLED, UserError

Child = tuple[str, nn.Module]
T = TypeVar("T")
OWN = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TensorSpec(NamedTuple):
    """The shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A call of the model for one micro-batch, which the first process sends to the others."""

    input: TensorSpec
    autocast: torch.dtype | None
    seed: int


class PeerFailedError(Exception):
    """Another process of the pipeline has failed, and reports the error."""


def cut(model: nn.Module, count: int, boundaries: Sequence[int] | None) -> list[list[Child]]:
    """Return `model`'s children in `count` parts, balanced by default. Raises UserError if it cannot be cut so."""
    if type(model).forward is not nn.Sequential.forward or any(vars(model)[kind] for kind in OWN):
        raise UserError(
            f"model={type(model).__name__}: expected a plain nn.Sequential, without hooks of its own. Return "
            "nn.Sequential(*layers), between which one tensor passes, or use another strategy."
        )
    children: list[Child] = [(name, child) for name, child in model._modules.items() if child is not None]
    if len(children) < count:
        raise UserError(f"stages={count}: expected at most the model's children, {len(children)}. Use fewer stages.")
    sizes = [sum(p.numel() for p in child.parameters()) for _, child in children]
    starts = balanced(sizes, count) if boundaries is None else boundaries
    ends = [0, *starts, len(children)]
    if len(starts) != count - 1 or any(a >= b for a, b in pairwise(ends)):
        raise UserError(
            f"boundaries={list(starts)}: expected {count - 1} ascending numbers from 1 to {len(children) - 1}, the "
            f"first child of each of the {count} parts but the first."
        )
    parts = [children[a:b] for a, b in pairwise(ends)]
    owners: dict[Tensor, int] = {}
    for number, part in enumerate(parts):
        for name, child in part:
            for inner, tensor in (*child.named_parameters(), *child.named_buffers()):
                if owners.setdefault(tensor, number) != number:
                    raise UserError(
                        f"{name}.{inner} is also in another part of the pipeline: expected parts that share nothing. "
                        "Set boundaries so that both are in one part, or untie them."
                    )
    return parts


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Return where each part but the first begins, so that the largest is smallest. Raises UserError."""
    if not 1 <= parts <= len(sizes):
        raise UserError(f"stages={parts}: expected at most as many stages as layers, {len(sizes)}.")
    before = list(accumulate(sizes, initial=0))

    @cache  # few parts begin without parameters: torch refuses a part that begins with an in-place layer
    def best(stop: int, count: int) -> tuple[int, int, tuple[int, ...]]:
        """Of `count` parts of the layers before `stop`, return the largest size, the starts of size 0, all starts."""
        if count == 1:
            return before[stop], 0, ()
        found = ((*best(at, count - 1), at) for at in range(count - 1, stop))
        return min((max(n, before[stop] - before[at]), bare + (not sizes[at]), (*s, at)) for n, bare, s, at in found)

    return list(best(len(sizes), parts)[2])


class ModelCalled(BaseException):  # not an Exception: a task that catches those must not catch it
    """Ends a `loss()` at its call of the model."""

    def __init__(self, x: Tensor, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.input = x
        self.autocast = autocast


class PipelinedModel(nn.Module):
    """The model that `loss()` calls: on the first process the call ends `loss()`, on the last it returns the output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._outputs: list[Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the input, or return the output. Raises UserError for a second call, and another number of inputs."""
        if self._outputs is None:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise UserError("the model of a pipeline takes one tensor. Call it as model(x).")
            kind = args[0].device.type
            raise ModelCalled(args[0], torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        if not self._outputs:
            raise UserError("the model of a pipeline is called once for each micro-batch. Keep its output.")
        return self._outputs.pop()

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        raise AttributeError(
            f"model.{name}: the model of a pipeline is in parts on several processes. Call it as model(x), or use "
            "another strategy."
        )

    def input_of(self, compute: Callable[[], object]) -> ModelCalled:
        """Return the input with which `compute` calls the model. Raises what it raises before that."""
        try:
            compute()
        except ModelCalled as called:
            return called
        raise UserError(MODEL_NOT_CALLED)

    def with_output(self, output: Any, compute: Callable[[], T]) -> T:
        """Return the result of `compute` if the model returns `output`."""
        self._outputs = [output]
        try:
            result = compute()
            if self._outputs:
                raise UserError(MODEL_NOT_CALLED)
            return result
        finally:
            self._outputs = None


class Part(nn.Module):
    """The part for torch's schedules, which pass it the index of the micro-batch as a tensor."""

    def __init__(self, compute: Callable[[Tensor | None, int], Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, activation: Tensor | None = None, *, micro: Tensor) -> Tensor:
        """Return the output for micro-batch `micro`, or the loss in the last part."""
        return self._compute(activation, int(micro))


def zeros(spec: TensorSpec, device: torch.device) -> Tensor:
    """Return zeros, which require grad if their dtype can."""
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device, requires_grad=spec.dtype.is_floating_point)
