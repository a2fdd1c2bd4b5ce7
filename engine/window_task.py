"""The window task: a task whose loss is a function of all outputs of a window, over all processes."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.loss import TOO_NARROW, Terms, check_terms
from engine.signals import Interrupted
from engine.task import Task


class Rows(NamedTuple):
    """An output with one row a sample: those of all micro-batches and processes are concatenated in sample order."""

    tensor: Tensor


class Added(NamedTuple):
    """An output of any shape that is summed over all micro-batches and processes: counts, sums of probabilities."""

    tensor: Tensor


class Shared(NamedTuple):
    """An output that does not depend on the batch: a parameter that stands in the loss, such as `logit_scale`.

    Its gradient counts once. Under FSDP let the model's forward return it.
    """

    tensor: Tensor


Output = Rows | Added | Shared


class WindowTask(Task):
    """A task whose loss depends on all samples of an update together: contrastive losses, load balance, Dice.

    Each window runs twice: a forward of every micro-batch without gradients, `window_loss` of all outputs, and a
    forward and backward of every micro-batch but one with the same random draws. The gradient is that of one graph
    over the window. Memory: the window's K micro-batches, and the outputs of all P x K x N samples on each process.
    """

    keeps_batches_on_host = False
    """Whether micro-batches wait for their second pass in the host's memory, and are copied to the device twice."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        """Return the outputs of one micro-batch by name, the same names each time; `model` is the prepared module.

        It is called twice for a micro-batch and must return the same both times. It may draw from the global generators
        of torch, Python and numpy: the second call draws the same. At least one output must require grad. Training
        raises UserError, on all processes, for other names or shapes, and for a second call with another result.
        """

    @abstractmethod
    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a window, a 0-dim tensor, from the outputs of all its samples on all processes.

        `outputs` are float32 or wider. The gradient is that of the returned value: nothing divides it.
        """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return `window_loss` of one micro-batch by itself: `evaluate` reports it, training does not use it."""
        tensors = {name: widened(output.tensor) for name, output in self.outputs(model, batch).items()}
        with torch.autocast(next(iter(tensors.values())).device.type, enabled=False):
            return self.window_loss(tensors)


class TermTask(WindowTask):
    """A task whose `loss` returns several terms, with weights that only the forward knows. Each window runs twice."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Terms:  # type: ignore[override]
        """Return the terms of one micro-batch by name, the same names each time; weight 0 for what is missing."""

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        found: dict[str, Output] = {}
        for name, (total, weight) in check_terms(self.loss(model, batch)).items():
            counted = torch.as_tensor(weight, device=total.device).detach().double()
            found[name] = Added(total)
            found[f"{name} weight"] = Added(torch.where(counted >= 0, counted, math.nan))  # no sum hides it
        return found

    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name in (name for name in outputs if f"{name} weight" in outputs):
            if not math.isfinite(weight := outputs[f"{name} weight"].item()):
                raise UserError(f"term {name!r} has a weight that is negative or not finite. Use 0 to leave one out.")
            if weight:
                parts.append(outputs[name] / weight)
                self.log(name, parts[-1], weight)
        if not parts:
            raise Interrupted  # on all processes: this window has weight 0
        return sum(parts[1:], parts[0])


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if it is narrower."""
    return tensor.float() if tensor.dtype in TOO_NARROW else tensor
