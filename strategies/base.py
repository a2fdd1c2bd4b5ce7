"""The interface of a strategy: devices, processes and collectives. It knows no epoch, callback or file."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.bits import sum_of_bits
from strategies.errors import UserError
from strategies.gradient_norm import norm_of
from strategies.host_messages import HostMessages
from strategies.optimizer_state import copy_of, load_named_state, named_state, user_module, user_name
from strategies.to_device import move

Compute = Callable[[nn.Module, Any], Mapping[str, Any]]


@dataclass(slots=True)  # its fields are read at each micro-batch: slots cost the least
class MicroBatch:
    """One micro-batch of a window: the input of one forward and backward."""

    batch: Any  # the data, on the device
    size: int  # its samples
    seed_index: int  # the index, in the epoch, by which the random draws of its forward are seeded
    is_last: bool  # whether it is the last one of this process in the window, so that the update follows
    size_problem: str = ""  # why `size` cannot weigh a mean over its samples; "" if it can


class Strategy(HostMessages, ABC):
    """Devices, processes and their collectives. Subclass it, or a built-in one, for a new backend.

    Only `accumulation_context`, `effective_batch` and `supports_variable_windows` must be given; every other method
    has a default for one process on one device. Methods stand in the order of a run's life.
    """

    name: str = "custom"
    """Its name in the banner and in error messages."""

    exact_to: float | None = 1e-12
    """Largest relative difference, in float64, from the update of one big batch; None if they need not agree."""

    defers_reduction: bool = True
    """Whether gradients are reduced once per window; False: once per micro-batch."""

    resumes_exactly: bool = True
    """Whether a resumed run equals the uninterrupted run to the bit."""

    micro_batches: int | None = None
    """K, if it is fixed when the strategy is built; `run_window` then runs a window as a whole."""

    compiles_in_place: bool = True
    """Whether a forward calls the user's model as a whole, so that it can be compiled; False: copies or parts."""

    evaluates_alone: bool = True
    """Whether a process can stop validating while the others continue."""

    supports_window_losses = True
    """Whether it can run a window twice, for a loss over all outputs of the window."""

    supports_open_windows = True
    """Whether processes can call forward and backward differently often, before a pass without data reduces."""

    holds_model = True
    """Whether each process holds the whole model. `holds_all` asks for the optimizer's state too."""

    has_model = False
    """Whether `prepare` has a model, until `release_model`."""

    runs_twice = False
    """Whether each window runs twice; the engine sets it before `prepare`."""

    supports_redo: bool = False
    """Whether a window that ran out of memory on a process can run again, on all, in smaller micro-batches."""

    message_length = 0
    """The numbers in each message of an engine by `exchange`; the engine sets it."""

    left_out: Collection[str] = ()
    """The parameters that `state_dict` leaves out, by name; the engine sets it."""

    _model: nn.Module
    _parameters: list[nn.Parameter]
    _scale = math.nan
    _gradient = torch.empty(())

    # Declared by every strategy

    @property
    @abstractmethod
    def supports_variable_windows(self) -> bool:
        """Whether K may change during a run. If False, the engine refuses such a schedule before anything starts."""

    @abstractmethod
    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return the context around FORWARD AND BACKWARD of one micro-batch; only the last one may communicate."""

    @abstractmethod
    def effective_batch(self, N: int, K: int) -> int:
        """Return the samples of one full update: K micro-batches of N samples on each of the P processes."""

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
        """All started processes: more than P if several processes share one model and its micro-batches."""
        return self.data_parallel_size

    @property
    def device(self) -> torch.device:
        """The device of this process's model and batches."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self) -> str:
        """Return one line for the banner."""
        return f"{self.name} on {self.device}"

    def setup(self) -> None:
        """Start process groups. Raises UserError if the strategy cannot run as it was started."""

    def teardown(self) -> None:
        """Undo `setup`: destroy the groups that it made, leave those that existed before, and let go of the model."""
        self.release_model()

    def release_model(self) -> None:
        """Undo `prepare` and `prepare_optimizer`: another model can be prepared."""
        self.has_model, self.left_out, self.runs_twice = False, (), False

    # The model

    @property
    def needs_equal_windows(self) -> bool:
        """Whether a forward communicates (SyncBatchNorm), so that all processes need equally many micro-batches.

        Known after `prepare`. The engine refuses data and windows that do not promise it.
        """
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device; return the module to call in training. Raises UserError for a second model."""
        self._take_model()
        self._model = model.to(self.device)
        self._parameters = list(model.parameters())
        return self._model

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Take part in the steps of `optimizer`, which stays the same object. Called once, after `prepare`."""

    def to_device(self, batch: Any) -> Any:
        """Return `batch` with every tensor in it (in dicts, lists, tuples; anything with `.to`) on the device."""
        return batch if self._is_on_cpu else move(batch, self.device)

    def seed(self, value: int) -> None:
        """Seed the generators that a forward on this process draws from."""
        torch.default_generator.manual_seed(value)
        if not self._is_on_cpu and self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(value)

    # One window

    def start_window(self, most_micro_batches: int) -> None:
        """Called before each window with the largest number of micro-batches of any process: at most K.

        FSDP needs the number, since each forward communicates. DDP wraps the model again if parameters were frozen.
        """

    def run_window(self, window: Iterable[MicroBatch], forward: Callable[[Any], tuple[Tensor, float | Tensor]]) -> None:
        """Run one window: afterwards `p.grad` holds the sum over processes and micro-batches of scale x d(loss).

        `forward(micro)` returns a micro-batch's loss (0-dim) and the scale of its gradient. Iterate over `window` once.
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
            gradient = self._gradient  # kept between calls: a new tensor costs more than the call of backward
            if scale != self._scale or loss.dtype is not gradient.dtype:
                gradient = self._gradient = torch.full_like(loss, scale, requires_grad=False)
                self._scale = scale
        torch.autograd.backward((loss,), (gradient,))

    def join(self, window: Any) -> None:
        """Take part, with weight 0, in a window in which this process has no micro-batch."""

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        """Multiply the gradients by `factor`, clip them to `max_norm`, return their norm (0-dim) between the two.

        It is the 2-norm over all parameters, clipped as by `torch.nn.utils.clip_grad_norm_`, without host-device sync.
        """
        gradients = self._gradients()
        norm = self._norm(gradients)
        if factor != 1.0:
            norm = norm * factor
        if not gradients:
            return norm
        if max_norm is not None:
            torch._foreach_mul_(gradients, factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        elif factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return norm

    def own_norm(self) -> Tensor | None:
        """Return the norm of this process's gradients before its last micro-batch; None if others' may be in them."""
        return None

    def clear_gradients(self) -> None:
        """Set the gradient of every parameter of the model to None, those that no optimizer holds included."""
        for parameter in self._parameters:
            parameter.grad = None

    def evaluate(self, compute: Compute, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """Return `compute(model, batch)`, or {} if another process has it. `model` is the user's, in eval mode."""
        return compute(model, batch)

    # Windows that run again: for a loss over all outputs, or because memory ran out

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The context of a forward that keeps no graph, because its micro-batch runs again."""
        with self.accumulation_context(False), torch.no_grad():
            yield

    def end_first_pass(self, has_output: bool) -> None:
        """Called on all processes after the forwards of the first pass; then they exchange their outputs.

        The last forward keeps its graph. `has_output` is False on a process without data, or whose first pass failed.
        """

    def finish_reduction(self) -> bool:
        """Let the others finish a window whose last backward failed here, with a gradient norm that is not finite.

        Return False if that cannot be done: they then wait in vain. Needed by several processes with `supports_redo`.
        """
        return False

    def restart_reduction(self) -> None:
        """Called on all processes after a window that ran out of memory: it may have left a reduction unfinished."""

    # Between processes

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce `tensor` in place over the processes by "sum", "min" or "max", on the device's group; return it."""
        return tensor

    def gather_bytes(self, data: Tensor, most: int) -> list[Tensor]:
        """Return each process's bytes in rank order, on the device. At most `most`; may be padded to it."""
        return [row.to(self.device) for row in self.gather(data.cpu())]

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Give all processes the same buffers in `model` (BatchNorm's statistics), those of process 0."""

    def evaluation_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context around an evaluation: in it, the forward of `model` does not communicate."""
        return nullcontext()

    def fingerprint(self) -> int:
        """Return the sum of all parameters' bits as integers: equal on processes that hold the same replica.

        A strategy whose processes hold different parameters returns 0.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for parameter in self._parameters:
            total += sum_of_bits(self._local(parameter.detach()))
        return int(total)

    # Checkpoints and costs

    @property
    def holds_all(self) -> bool:
        """Whether each process holds the whole of `state_dict`, so that process 0 can save it alone."""
        return self.holds_model

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) of the reduction of one window's gradients, on each process."""
        return 0, 0

    def bytes_to_reduce(self, model: nn.Module) -> int | None:
        """Return the bytes of `reductions` for `model` before `setup`; None if unknown."""
        return 0 if self.data_parallel_size == 1 else None

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return a copy of {"model": ..., "optimizer": ...} on the CPU, under the user's names (no `module.`).

        If `holds_all` is False, call it on all processes together; process 0 then gets the whole state.
        """
        model = {user_name(name): value for name, value in self._user_module.state_dict().items()}
        state: dict[str, Any] = {"model": {name: value for name, value in model.items() if name not in self.left_out}}
        if optimizer is not None:
            state["optimizer"] = named_state(self._user_module, optimizer)
        with torch.no_grad():
            return copy_of(state, self._copied)  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load what `state_dict` returned. Raises RuntimeError or UserError for other names, groups or shapes."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_model_state_dict(self._user_module, state["model"], options=options)
        if optimizer is not None:
            load_named_state(self._user_module, optimizer, state["optimizer"])

    def _take_model(self) -> None:
        """Raise UserError if the strategy has a model already: it would clear and clip the gradients of the last."""
        if self.has_model:
            raise UserError(
                f"strategy {self.name!r} has prepared a model already: expected one model for each strategy. Use "
                "another strategy object for the second, or call teardown() first."
            )
        self.has_model = True

    @cached_property
    def _is_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def _user_module(self) -> nn.Module:
        """The model under the wrapper that `torch.compile` puts around it."""
        return user_module(self._model)

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or gradient that this process holds."""
        return tensor

    def _gradients(self) -> list[Tensor]:
        """The gradients that are not None, as far as this process holds them."""
        return [gradient for p in self._parameters if (gradient := p.grad) is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole gradient; `gradients` are the parts that this process holds."""
        return norm_of(gradients, self._is_on_cpu) if gradients else torch.zeros((), device=self.device)

    def _copied(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor that `state_dict` returns."""
        return tensor.clone() if tensor.is_cpu else tensor.detach().to("cpu", copy=True)
