"""A model that is cut into parts: the cut, what `loss()` is given instead of the model, and what passes between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from strategies.pipeline.partition import balanced

Child = tuple[str, nn.Module]
T = TypeVar("T")


class TensorSpec(NamedTuple):
    """The shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """What the first process tells the others of a micro-batch: the model's input, and how it was called."""

    input: TensorSpec
    autocast: torch.dtype | None
    seed: int


class PeerFailedError(Exception):
    """Another process of the pipeline has failed; it tells of it itself."""


def cut(model: nn.Module, count: int, boundaries: Sequence[int] | None) -> list[list[Child]]:
    """Return `model`'s children in `count` parts, balanced by parameters where no `boundaries` are given.

    Raises ValueError for anything but a plain `nn.Sequential` with enough children, for boundaries that do not fit,
    and for parts that share a parameter or a buffer.
    """
    if type(model).forward is not nn.Sequential.forward or model._parameters or model._buffers:
        raise ValueError(
            f"a pipeline needs a plain nn.Sequential, and the model is a {type(model).__name__}: return its layers as "
            "nn.Sequential(...), each of which takes the one tensor that the layer before returns, or use another "
            "strategy."
        )
    children: list[Child] = [(name, child) for name, child in model._modules.items() if child is not None]
    if len(children) < count:
        raise ValueError(
            f"the model has {len(children)} children, which cannot be cut into {count} parts: use fewer stages."
        )
    sizes = [sum(p.numel() for p in child.parameters()) for _, child in children]
    starts = balanced(sizes, count) if boundaries is None else boundaries
    ends = [0, *starts, len(children)]
    if len(starts) != count - 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(
            f"boundaries={list(starts)}: give {count - 1} ascending numbers from 1 to {len(children) - 1}, the "
            f"children of the model that begin each of the {count} parts but the first."
        )
    parts = [children[a:b] for a, b in pairwise(ends)]
    owners: dict[Tensor, int] = {}
    for number, part in enumerate(parts):
        for name, child in part:
            for inner, tensor in (*child.named_parameters(), *child.named_buffers()):
                if owners.setdefault(tensor, number) != number:
                    raise ValueError(
                        f"{name}.{inner} is also in another part of the pipeline: parts share nothing. Set boundaries "
                        "so that both are in one, or untie them."
                    )
    return parts


class ModelCalled(BaseException):  # no Exception: a task that catches those must not catch this
    """Ends a `loss()` where it calls the model."""

    def __init__(self, x: Tensor, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.input = x
        self.autocast = autocast


class PipelinedModel(nn.Module):
    """What `loss()` is given: its call ends it on the first process, and gives the pipeline's output on the last."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._outputs: list[Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the input, or return the output. Raises ValueError for a second call, and another number of inputs."""
        if self._outputs is None:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise ValueError("a pipeline's model takes one tensor: call it as model(x).")
            kind = args[0].device.type
            raise ModelCalled(args[0], torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        if not self._outputs:
            raise ValueError("a pipeline's model is called once for each micro-batch: keep what it returned.")
        return self._outputs.pop()

    def input_of(self, compute: Callable[[], object]) -> ModelCalled:
        """Return what `compute` calls the model with. Raises what it raises before that."""
        try:
            compute()
        except ModelCalled as reached:
            return reached
        raise ValueError(_NOT_CALLED)

    def with_output(self, output: Any, compute: Callable[[], T]) -> T:
        """Return what `compute` returns where the model gives `output`."""
        self._outputs = [output]
        try:
            result = compute()
            if self._outputs:
                raise ValueError(_NOT_CALLED)
            return result
        finally:
            self._outputs = None


_NOT_CALLED = "the loss was not computed with the `model` that loss() is given: call that one."


class Part(nn.Module):
    """A part as torch's schedules call it: with the number of the micro-batch, which splits as tensors do."""

    def __init__(self, compute: Callable[[Tensor | None, int], Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, activation: Tensor | None = None, *, micro: Tensor) -> Tensor:
        """Return the output for micro-batch `micro`, the loss where the model ends."""
        return self._compute(activation, int(micro))


def already_computed(loss: Tensor, target: Tensor) -> Tensor:
    """Return what the last part returned: it is the loss."""
    return loss


def zeros(like: TensorSpec, device: torch.device) -> Tensor:
    """Return zeros, which require grad where they can."""
    return torch.zeros(like.shape, dtype=like.dtype, device=device, requires_grad=like.dtype.is_floating_point)


def buckets(parameters: Iterable[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Return the trainable ones in order, in lists of one dtype and about `size` bytes."""
    found: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        if parameter.requires_grad:
            if not found or filled >= size or found[-1][0].dtype != parameter.dtype:
                found.append([])
                filled = 0
            found[-1].append(parameter)
            filled += parameter.numel() * parameter.element_size()
    return found
