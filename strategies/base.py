"""What a place to run must say of itself: devices, processes, collectives. It knows no epoch, callback or file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from strategies.optimizer_state import load_named_state, named_state

PendingRows = Callable[[], list[list[float]]]
"""Waits for an exchange and returns each process's values, in rank order."""


class MicroBatch(Protocol):
    """What a window yields: it alone knows whether it is the last one of this process in the window."""

    @property
    def is_last(self) -> bool:
        """Whether the update follows."""
        ...


class Strategy(ABC):
    """Where and on how many processes a model trains. Subclass it, or a built-in one, for a new backend.

    Only `accumulation_context`, `effective_batch` and `supports_variable_windows` must be given; every other method
    has a default that is right for one process on one device. Methods stand in the order of a run's life.
    """

    name: str = "custom"
    """What the banner and error messages call it."""

    exact_to: float | None = 1e-12
    """How far an update may be from that of one big batch, relative, in float64; None: it is meant to be another."""

    defers_reduction: bool = True
    """Whether gradients cross the wire once per window; False: once per micro-batch."""

    resumes_exactly: bool = True
    """Whether a run that goes on from a checkpoint is to the bit the run that was not interrupted."""

    micro_batches: int | None = None
    """K, where it is fixed when the strategy is built: a window is then run whole, by `run_window`."""

    compiles_in_place: bool = True
    """Whether a forward calls the user's model as a whole, so that it can be compiled; False: copies or parts of it."""

    evaluates_alone: bool = True
    """Whether a process can leave a validation without another one waiting for it."""

    _model: nn.Module
    _parameters: list[nn.Parameter]
    _scale = math.nan
    _gradient = torch.empty(())

    # What every strategy declares

    @property
    @abstractmethod
    def supports_variable_windows(self) -> bool:
        """Whether K may change during a run. False makes the engine refuse such a schedule before anything starts."""

    @abstractmethod
    def effective_batch(self, N: int, K: int) -> int:
        """Return the samples behind one full update: K micro-batches of N samples on each of the P."""

    @abstractmethod
    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return the context around FORWARD AND BACKWARD of one micro-batch; only the last one may communicate."""

    # Processes and devices

    @property
    def rank(self) -> int:
        """This process among all that were started, from 0. Known before `setup`."""
        return 0

    @property
    def local_rank(self) -> int:
        """This process among those of its host, from 0."""
        return self.rank

    @property
    def data_parallel_size(self) -> int:
        """P, the processes that train on different samples. Known before `setup`."""
        return 1

    @property
    def data_parallel_rank(self) -> int:
        """This process among the P, from 0: which micro-batches it gets."""
        return self.rank

    @property
    def processes(self) -> int:
        """All that were started together: more than P where several share one model, and its micro-batches."""
        return self.data_parallel_size

    @property
    def device(self) -> torch.device:
        """Where this process computes: its model's and its batches' device."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self) -> str:
        """Return one line for the banner."""
        return f"{self.name} on {self.device}"

    def setup(self) -> None:
        """Start what the strategy needs (process groups). Raises ValueError where it cannot run as it was started."""

    def teardown(self) -> None:
        """Undo `setup`: what was made here is destroyed, what was found is left."""

    # The model

    @property
    def needs_equal_windows(self) -> bool:
        """Whether a forward communicates (SyncBatchNorm), so that processes must have equally many in each window.

        Known after `prepare`; True makes the engine refuse data and windows that do not promise it.
        """
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device and return the module to call in training, which may be a wrapper around it."""
        self._model = model.to(self.device)
        self._parameters = list(model.parameters())
        return self._model

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Take part in the steps of `optimizer`, which stays the object it is: an LR scheduler may hold it.

        Called once, after `prepare` and before any `step` or `load_state_dict`.
        """

    def to_device(self, batch: Any) -> Any:
        """Return `batch` with every tensor in it (in dicts, lists, tuples; anything with `.to`) on the device."""
        return batch if self._is_on_cpu else _move(batch, self.device)

    def seed(self, value: int) -> None:
        """Seed the generators that a forward on this process draws from."""
        torch.default_generator.manual_seed(value)
        if not self._is_on_cpu and self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(value)

    # One window

    def start_window(self, most_micro_batches: int) -> None:
        """Hear, before a window, how many micro-batches a process can have in it: K, or fewer at a known end.

        It is the same number on all processes, for strategies whose every forward communicates.
        """

    def run_window(
        self,
        window: Iterable[MicroBatch],
        forward: Callable[[Any], tuple[Tensor, float | Tensor]],
    ) -> None:
        """Run one window: afterwards `p.grad` holds the sum over processes and micro-batches of scale x d(loss).

        `forward(micro)` returns a micro-batch's loss, a 0-dim tensor, and the scale of its gradient. Of `window`, count
        on nothing but that it can be iterated over once.
        """
        micro = None
        for micro in window:
            with self.accumulation_context(micro.is_last):
                loss, scale = forward(micro)
                self.backward(loss, scale)
        if micro is None:
            self.join(window)

    def backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Add `scale x d(loss)` to the gradients; after the window's last call they are summed over the processes."""
        if isinstance(scale, Tensor):
            gradient = scale.to(loss.dtype)
        else:
            gradient = self._gradient  # kept from call to call: making it anew costs more than calling backward
            if scale != self._scale or loss.dtype is not gradient.dtype:
                gradient = self._gradient = torch.full_like(loss, scale, requires_grad=False)
                self._scale = scale
        torch.autograd.backward((loss,), (gradient,))

    def join(self, window: Any) -> None:
        """Take part, with weight 0, in a window in which this process has no micro-batch."""

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        """Multiply the gradients by `factor`, clip them to `max_norm`, return their norm (0-dim) before the clipping.

        The norm is the 2-norm over all parameters, after `factor`. The clipping is that of
        `torch.nn.utils.clip_grad_norm_`. Nothing is read back from the device.
        """
        gradients = self._gradients()
        if not gradients:
            return torch.zeros((), device=self.device)
        norm = self._norm(gradients)
        if factor != 1.0:
            norm = norm * factor
        if max_norm is not None:
            torch._foreach_mul_(gradients, factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        elif factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return norm

    def clear_gradients(self) -> None:
        """Set the gradient of every parameter of the model to None, those that no optimizer holds included.

        `Optimizer.zero_grad` leaves the latter to leak into the next window's norm, and costs 40 times as much.
        """
        for parameter in self._parameters:
            parameter.grad = None

    def evaluate(
        self, compute: Callable[[nn.Module, Any], Mapping[str, Any]], model: nn.Module, batch: Any
    ) -> Mapping[str, Any]:
        """Return `compute(model, batch)`; nothing where another process has it. `model` is the user's, in eval mode."""
        return compute(model, batch)

    # Between processes

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce `tensor` in place over the processes by "sum", "min" or "max", on the device's group; return it."""
        return tensor

    def exchange(self, values: Sequence[float]) -> PendingRows:
        """Start sending a few host numbers to all processes; call what comes back to wait and get all rows."""
        row = list(values)
        return lambda: [row]

    def gather(self, value: Any) -> list[Any]:
        """Return each process's `value` (anything that pickles) in rank order. Slow: for starts and ends."""
        return [value]

    def post(self, topic: str, text: str) -> None:
        """Leave a text for the other processes, who may read it without this one's help; a later one replaces it."""

    def posted(self, topic: str) -> dict[int, str]:
        """Return what was posted under `topic`, by rank, as far as it can still be read."""
        return {}

    def has_lost_contact(self, error: Exception) -> bool:
        """Whether `error` means that another process is gone or has not answered in time."""
        return False

    def barrier(self) -> None:
        """Wait until every process is here."""

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Give all processes the same buffers in `model` (BatchNorm's statistics), those of process 0."""

    def evaluation_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context around an evaluation: in it, the forward of `model` communicates with nobody."""
        return nullcontext()

    def fingerprint(self) -> int:
        """Return a number that is the same on all processes when they hold the same replica, to the bit.

        It is the sum of all parameters' bits as whole numbers. A strategy whose processes hold different parameters
        returns 0.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for parameter in self._parameters:
            values = self._local(parameter.detach()).contiguous()
            flat = (torch.view_as_real(values) if values.is_complex() else values).view(-1)
            total += flat.view(_WHOLE[flat.element_size()]).sum(dtype=torch.int64)
        return int(total)

    # What a run keeps

    @property
    def holds_all(self) -> bool:
        """Whether each process holds all that `state_dict` returns, so that process 0 alone can save it."""
        return True

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) that one window's gradients cross the wire with, on each process."""
        return 0, 0

    def bytes_to_reduce(self, model: nn.Module) -> int | None:
        """Return the bytes of `reductions` for `model` before anything is set up; None where they are not known."""
        return 0 if self.data_parallel_size == 1 else None

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return a copy of {"model": ..., "optimizer": ...} on the CPU, under the user's own parameter names.

        On all processes together where a process holds only a part, and then whole on process 0; else any one may ask.
        Names carry no `module.` and no `_orig_mod.` (torch.distributed.checkpoint.state_dict does the naming). Where a
        strategy keeps something from update to update, that is under "strategy", with the optimizer.
        """
        from torch.distributed.checkpoint import state_dict as dcp

        state: dict[str, Any] = {"model": dcp.get_model_state_dict(self._user_module)}
        if optimizer is not None:
            state["optimizer"] = named_state(self._user_module, optimizer)
        copied: dict[str, Any] = tree_map_only(Tensor, self._copied, state)
        return copied

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load what `state_dict` returned. Raises RuntimeError or ValueError for other names, groups or shapes."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_model_state_dict(self._user_module, state["model"], options=options)
        if optimizer is not None:
            load_named_state(self._user_module, optimizer, state["optimizer"])

    @cached_property
    def _is_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def _user_module(self) -> nn.Module:
        """The model under the wrapper that `torch.compile` puts around it."""
        module: nn.Module = getattr(self._model, "_orig_mod", self._model)
        return module

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or gradient that this process holds."""
        return tensor

    def _gradients(self) -> list[Tensor]:
        """The gradients that there are, as far as this process holds them."""
        return [gradient for p in self._parameters if (gradient := p.grad) is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole gradient, of which these are the parts that this process holds."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm

    def _copied(self, tensor: Tensor) -> Tensor:
        """What `state_dict` returns of a tensor."""
        return tensor.detach().to("cpu", copy=True)


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    if type(batch) is dict:
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(_move(value, device) for value in batch)
    if isinstance(batch, Mapping):
        moved = copy(batch)
        for key, value in batch.items():
            moved[key] = _move(value, device)  # type: ignore[index]
        return moved
    return batch
