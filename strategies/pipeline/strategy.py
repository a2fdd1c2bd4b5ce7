"""Pipeline parallelism: processes share one model layer by layer, and torch's schedules run each window."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _take_tensors
from torch.optim import Optimizer

from strategies.base import Compute, MicroBatch
from strategies.environment import started_processes
from strategies.errors import UserError, check_count
from strategies.host_messages import PendingRows
from strategies.optimizer_state import copy_of, load_named_state, merged, named_state, user_name
from strategies.pipeline.chain import Chain
from strategies.pipeline.parts import Call, PeerFailedError, PipelinedModel, TensorSpec, cut
from strategies.pipeline.schedules import ScheduleName, Schedules, takes
from strategies.process_group import ProcessGroupStrategy
from strategies.single import NOTHING_TO_DEFER

BUCKET_BYTES = 25 << 20  # size of a bucket of gradients, which are reduced over the pipelines as in DDP


class PipelineStrategy(ProcessGroupStrategy):
    """Cut one model into parts that run on `stages` processes; P = processes / stages train copies of it.

    A window is one run of the `schedule`, so K is fixed: `micro_batches` must be the trainer's
    `accumulate_grad_batches`. Fewer micro-batches, and neighbours of another shape, run a shorter schedule, without
    padding.

    The model is an `nn.Sequential` between whose children one tensor passes. `boundaries` are the indices of the
    children that begin each later part (`[3]`: children 0 to 2, and the rest); None balances them by parameters. The
    task's `loss` calls the model once, with one tensor: it runs up to that call on the first process of a pipeline, and
    past it on the last.

    Other processes' parts are on the meta device. `timeout_seconds` bounds every wait for another process, `device` is
    "cpu" or "cuda" (default: CUDA if available).
    """

    name = "pipeline"
    supports_window_losses = False
    supports_variable_windows = False
    compiles_in_place = False
    evaluates_alone = False
    holds_model = False

    def __init__(
        self,
        stages: int = 2,
        schedule: ScheduleName = "1F1B",
        micro_batches: int = 4,
        boundaries: Sequence[int] | None = None,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        super().__init__(timeout_seconds, device)
        if schedule not in get_args(ScheduleName):
            raise UserError(f"schedule={schedule!r}: expected one of {', '.join(get_args(ScheduleName))}.")
        check_count("stages", stages, 2, "Use 'single' or 'ddp' for a model on one process.")
        check_count("micro_batches", micro_batches)
        self.stages, self.schedule, self.micro_batches = stages, schedule, micro_batches
        self.boundaries = None if boundaries is None else list(boundaries)
        if not takes(schedule, stages, micro_batches):
            least = f"expected at least {stages} for {schedule} over {stages} stages"
            raise UserError(f"micro_batches={micro_batches}: {least}. Use more, or schedule='GPipe'.")
        self._groups: list[dist.ProcessGroup] = []

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return a context that does nothing: the schedule owns the window, and gradients are reduced after it."""
        return NOTHING_TO_DEFER

    @property
    def data_parallel_size(self) -> int:
        return max(1, self.processes // self.stages)

    @property
    def data_parallel_rank(self) -> int:
        """The pipeline of this process: neighbouring processes share a model."""
        return self.rank // self.stages

    def describe(self) -> str:
        shape = f"{self.data_parallel_size} x {self.stages} stages on {self._device_type}"
        return f"{self.name}: {shape}, {self.schedule} of {self.micro_batches} micro-batches"

    def setup(self) -> None:
        """Make the groups. Raises UserError unless `stages` divides them, RuntimeError if torch lacks a part."""
        if (processes := started_processes()) % self.stages:
            seen = f"expected a multiple of {self.stages} processes, but {processes} were started"
            raise UserError(f"stages={self.stages}: {seen}. Use torchrun --nproc_per_node={self.stages}.")
        super().setup()
        S, P = self.stages, self.data_parallel_size
        pipelines = [list(range(p * S, p * S + S)) for p in range(P)]
        copies = [list(range(stage, P * S, S)) for stage in range(S)]
        kinds = (pipelines, self._backend), (pipelines, "gloo"), (copies, self._backend)
        self._groups = [
            dist.new_subgroups_by_enumeration(ranks, timeout=self.timeout, backend=backend)[0]  # type: ignore[no-untyped-call]
            for ranks, backend in kinds
        ]
        self._ranks = pipelines[self.data_parallel_rank]
        self._copies = self._groups[2]  # the processes with the same part in all pipelines

    def teardown(self) -> None:
        for part in ("_chain", "_schedules", "_copies"):
            vars(self).pop(part, None)
        gc.collect()  # the users of the groups must be gone before them
        if not self._owns_group and dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []
        super().teardown()

    # The model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cut `model`, keep this process's part and return the module to call. Raises UserError as `cut` does."""
        self._take_model()
        stage = self.rank % self.stages
        self._children = dict(cut(model, self.stages, self.boundaries)[stage])
        for name, child in model.named_children():
            child.to(self.device if name in self._children else "meta")
        part = nn.Sequential(*self._children.values())
        self._chain = Chain(part, stage, self._ranks, self.device, *self._groups[:2])
        self._parameters = list(part.parameters())
        self._model, self._pipelined = model, PipelinedModel(model)
        self._schedules = Schedules(self.schedule, self._chain, self._pipelined, super().seed)
        return self._pipelined

    # One window

    def seed(self, value: int) -> None:
        self._seed = value
        super().seed(value)

    def run_window(self, window: Iterable[MicroBatch], forward: Callable[[Any], tuple[Tensor, float | Tensor]]) -> None:
        """Run one window by the schedule, and sum its gradients over the pipelines. All end it if one fails."""
        self._share_buffers()
        with suppress(PeerFailedError):  # that process reports the error
            micros, calls, inputs = self._start(window, forward)
            self._schedules.run(calls, inputs, [partial(forward, micro) for micro in micros])
        self._reduce()

    def _start(
        self, window: Iterable[MicroBatch], forward: Callable[[Any], object]
    ) -> tuple[list[MicroBatch], list[Call], list[Tensor]]:
        """Return the micro-batches, the calls of the model and their inputs. Raises UserError for unequal numbers."""
        micros: list[MicroBatch] = []
        inputs: list[Tensor] = []

        def read() -> tuple[int, list[Call]]:
            micros.extend(window)
            calls = []
            for micro in micros if self._chain.is_first else ():
                called = self._pipelined.input_of(partial(forward, micro))
                inputs.append(called.input)
                spec = TensorSpec(tuple(called.input.shape), called.input.dtype)
                calls.append(Call(spec, called.autocast, self._seed))
            return len(micros), calls

        rows = self._chain.together(read)
        counts = [count for count, _ in rows]
        if len(set(counts)) > 1:
            raise UserError(f"the processes of a pipeline got {counts} micro-batches: they must read the same data.")
        return micros, rows[0][1], inputs

    def join(self, window: Any) -> None:
        """Take part with zeros in the reduction of a window."""
        self._reduce()

    def exchange(self, values: Sequence[float]) -> PendingRows:
        """Start an exchange. Raises the error that broke the schedule: the others wait in it."""
        if self._schedules.broken is not None:
            raise self._schedules.broken
        return super().exchange(values)

    def _share_buffers(self) -> None:
        """Send the buffers of the first pipeline (BatchNorm's statistics) to all."""
        if self.data_parallel_size > 1:
            for buffer in self._chain.part.buffers():
                dist.broadcast(buffer, src=self._chain.stage, group=self._copies)

    def _reduce(self) -> None:
        """Sum the gradients over the pipelines. A parameter that no pipeline used keeps the gradient None."""
        if self.data_parallel_size == 1:
            return
        for bucket in self._buckets():
            used = torch.tensor([float(p.grad is not None) for p in bucket])
            values = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
            flat = torch.cat([*values, used.to(values[0])])
            dist.all_reduce(flat, group=self._copies)
            *sums, counts = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
            for parameter, total, count in zip(bucket, sums, counts.tolist(), strict=True):
                if count:
                    parameter.grad = total.view_as(parameter)

    def _buckets(self) -> list[list[Tensor]]:
        trainable = [p for p in self._parameters if p.requires_grad]
        return [*_take_tensors(trainable, BUCKET_BYTES)]  # type: ignore[no-untyped-call]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        squared = super()._norm(gradients).double() ** 2
        dist.all_reduce(squared, group=self._chain.group)
        return squared.sqrt()

    def fingerprint(self) -> int:
        total = torch.tensor(super().fingerprint())
        dist.all_reduce(total, group=self._chain.host_group)
        return int(total)

    # Evaluation

    def evaluate(self, compute: Compute, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """Return `compute(model, batch)` on the last process of a pipeline, and {} on the others."""
        if not self._is_prepared(model):
            self.prepare(model)
        on_batch, x, autocast = partial(compute, self._pipelined, batch), None, None
        if self._chain.is_first:
            called = self._pipelined.input_of(on_batch)
            x, autocast = called.input, called.autocast
        output, _ = self._chain.through(x, autocast)
        return {} if output is None else self._pipelined.with_output(output, on_batch)

    def synchronize_buffers(self, model: nn.Module) -> None:
        if self._is_prepared(model):
            self._share_buffers()

    def _is_prepared(self, model: nn.Module) -> bool:
        return self.has_model and self._model is model

    # Checkpoints and costs

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) of one window's gradients, without what passes between the stages."""
        if self.data_parallel_size == 1:
            return 0, 0
        buckets = self._buckets()
        return len(buckets), sum(p.numel() * p.element_size() for bucket in buckets for p in bucket)

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return the whole model's state, gathered from the parts, on all processes together."""
        tensors = self._model.state_dict()
        own = {plain: name for plain, name in self._names(local=True).items() if plain not in self.left_out}
        local: dict[str, Any] = {"model": {plain: tensors[name] for plain, name in own.items()}}
        if optimizer is not None:
            local["optimizer"] = named_state(self._model, optimizer)
        with torch.no_grad():
            local = copy_of(local, self._copied)
        parts = self._chain.gather(local)
        model = {name: value for part in parts for name, value in part["model"].items()}
        names = [name for name in dict.fromkeys([*self._names(), *model]) if name in model]  # forward may register some
        state: dict[str, Any] = {"model": {name: model[name] for name in names}}
        if optimizer is not None:
            states = merged([part["optimizer"] for part in parts])["state"]
            state["optimizer"] = {
                "state": {name: states[name] for name in self._names() if name in states},
                "param_groups": local["optimizer"]["param_groups"],
            }
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load this process's part of a whole model's state. Raises RuntimeError or UserError for another model's."""
        if differing := {*state["model"]} ^ {*self._names()}:
            only = ", ".join(sorted(differing)[:3])
            raise RuntimeError(f"the state is that of another model: only one of them has {only}.")
        for child_name, child in self._children.items():
            prefix = f"{child_name}."
            names = {plain: name for plain, name in self._names().items() if name.startswith(prefix)}
            child.load_state_dict({name.removeprefix(prefix): state["model"][plain] for plain, name in names.items()})
        if optimizer is not None:
            saved = state["optimizer"]
            states = {name: value for name, value in saved["state"].items() if name in self._names(local=True)}
            load_named_state(self._model, optimizer, {**saved, "state": states})

    def _names(self, local: bool = False) -> dict[str, str]:
        """Return {user's name: name in `state_dict`} of the whole model, in order, or of this process's part."""
        names = [name for name in self._model.state_dict() if not local or name.partition(".")[0] in self._children]
        return {user_name(name): name for name in names}
