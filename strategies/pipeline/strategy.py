"""Several processes that share one model, layer after layer: torch.distributed.pipelining, one schedule per window."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from strategies.base import MicroBatch, PendingRows
from strategies.environment import started_processes
from strategies.optimizer_state import load_named_state, named_state
from strategies.pipeline.chain import Chain
from strategies.pipeline.parts import Call, PeerFailedError, PipelinedModel, TensorSpec, buckets, cut
from strategies.pipeline.schedules import ScheduleName, Schedules, takes
from strategies.process_group import ProcessGroupStrategy
from strategies.single import NOTHING_TO_DEFER
from strategies.torch_internals import PIPELINE

BUCKET_BYTES = 25 << 20
"""Gradients are reduced over the data-parallel processes in pieces of about this size, as DDP does."""


class PipelineStrategy(ProcessGroupStrategy):
    """Cut one model into parts that run on `stages` processes; P = processes / stages train copies of it.

    A window is one run of the `schedule`, so K is fixed when it is built: `micro_batches`, which must be the trainer's
    `accumulate_grad_batches`. A window with fewer micro-batches runs a schedule of its own, and so do those among them
    whose shapes differ: nothing is padded and nothing is counted that is no data.

    The model is an `nn.Sequential` between whose children one tensor passes. `boundaries` are the numbers of the
    children that begin each later part (`[3]`: children 0 to 2, and the rest); None balances them by parameters. With
    "Interleaved1F1B" each process has `parts_per_process` of them (default 2, else 1), taken in turn. The task's
    `loss` calls the model once, with its one input: it begins on the first process of a pipeline, and ends on the last.

    A process keeps its own parts; those of the others are on the meta device. `timeout_seconds` bounds every wait for
    another process, `device` is "cpu" or "cuda" (default: CUDA where there is one).
    """

    name = "pipeline"
    supports_variable_windows = False
    compiles_in_place = False
    evaluates_alone = False
    holds_all = False
    _torch_parts = PIPELINE

    def __init__(
        self,
        stages: int = 2,
        schedule: ScheduleName = "1F1B",
        micro_batches: int = 4,
        parts_per_process: int | None = None,
        boundaries: Sequence[int] | None = None,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        super().__init__(timeout_seconds, device)
        if schedule not in get_args(ScheduleName):
            raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(get_args(ScheduleName))}.")
        is_interleaved = schedule == "Interleaved1F1B"
        if parts_per_process is None:
            parts_per_process = 2 if is_interleaved else 1
        _check_count("stages", stages, 2, "a model on one process needs no pipeline: use 'single' or 'ddp'")
        _check_count("micro_batches", micro_batches, 1, "a window has at least one")
        _check_count("parts_per_process", parts_per_process, 1, "each process has at least one")
        if is_interleaved != (parts_per_process > 1):
            raise ValueError(
                f"parts_per_process={parts_per_process} with schedule={schedule!r}: Interleaved1F1B takes two or more "
                "parts on each process, the other schedules one."
            )
        self.stages = stages
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.parts_per_process = parts_per_process
        self.boundaries = None if boundaries is None else list(boundaries)
        if not takes(schedule, stages, micro_batches):
            rounds = "" if schedule == "1F1B" else f", and a multiple of micro_batches // {stages}"
            raise ValueError(
                f"micro_batches={micro_batches}: {schedule} over {stages} stages needs at least {stages}{rounds}. "
                "Use GPipe, or another number."
            )
        self._groups: list[dist.ProcessGroup] = []
        self._chain: Chain | None = None

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return a context that does nothing: the schedule owns the window, and gradients are reduced after it."""
        return NOTHING_TO_DEFER

    @property
    def data_parallel_size(self) -> int:
        """P, the pipelines: all processes / `stages`."""
        return max(1, self.processes // self.stages)

    @property
    def data_parallel_rank(self) -> int:
        """The pipeline of this process: processes that are next to one another share a model."""
        return self.rank // self.stages

    def describe(self) -> str:
        """Return one line for the banner."""
        shape = f"{self.data_parallel_size} x {self.stages} stages on {self._device_type}"
        return f"{self.name}: {shape}, {self.schedule} of {self.micro_batches} micro-batches"

    def setup(self) -> None:
        """Join the processes: all, those of this pipeline, and those with the same parts in the others.

        Raises ValueError for a number of processes that `stages` does not divide, RuntimeError for a torch that lacks
        what is used.
        """
        if (processes := started_processes()) % self.stages:
            raise ValueError(
                f"stages={self.stages}: {processes} processes cannot be cut into pipelines of {self.stages}. Start a "
                f"multiple of {self.stages}, as in torchrun --nproc_per_node={self.stages}."
            )
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

    def teardown(self) -> None:
        """Destroy the groups that `setup` made."""
        self._chain = None
        vars(self).pop("_schedules", None)
        gc.collect()  # what uses the groups must be gone before them
        if not self._owns_group and dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []
        super().teardown()

    # The model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cut `model`, keep this process's parts and return the module to call. Raises ValueError where it cannot."""
        parts = cut(model, self.stages * self.parts_per_process, self.boundaries)
        stage, last = self.rank % self.stages, len(parts) - 1
        self._children = {name: child for part in parts[stage :: self.stages] for name, child in part}
        for child in model.children():
            child.to(self.device if any(child is own for own in self._children.values()) else "meta")
        mine: dict[int, nn.Module] = {
            number: nn.Sequential(*(child for _, child in parts[number]))
            for number in range(stage, len(parts), self.stages)
        }
        self._chain = Chain(mine, last, stage, self._ranks, self.device, *self._groups[:2])
        self._parameters = list(dict.fromkeys(p for part in mine.values() for p in part.parameters()))
        self._model, self._pipelined = model, PipelinedModel(model)
        self._schedules = Schedules(self.schedule, self._chain, self._pipelined, super().seed)
        return self._pipelined

    # One window

    def seed(self, value: int) -> None:
        """Seed the generators; each part of the model then draws from a stream of its own."""
        self._seed = value
        super().seed(value)

    def run_window(self, window: Iterable[MicroBatch], forward: Callable[[Any], tuple[Tensor, float | Tensor]]) -> None:
        """Run one window by the schedule, and sum its gradients over the pipelines.

        `forward` runs up to the model on the first process, and past it on the last. Where one process fails, all end
        the window, so that they can hear of it.
        """
        self._share_buffers()
        with suppress(PeerFailedError):  # that process tells of it
            micros, calls, inputs = self._begin(window, forward)
            self._schedules.run(calls, inputs, [partial(forward, micro) for micro in micros])
        self._reduce()

    def _begin(
        self, window: Iterable[MicroBatch], forward: Callable[[Any], object]
    ) -> tuple[list[MicroBatch], list[Call], list[Tensor]]:
        """Return the micro-batches, how the model is called with each, and, on the first process, its inputs.

        Raises ValueError where the processes of the pipeline have different numbers of them.
        """
        micros: list[MicroBatch] = []
        inputs: list[Tensor] = []

        def begin() -> tuple[int, list[Call]]:
            micros.extend(window)
            calls = []
            for micro in micros if self._place.is_first else ():
                reached = self._pipelined.input_of(partial(forward, micro))
                inputs.append(reached.input)
                like = TensorSpec(tuple(reached.input.shape), reached.input.dtype)
                calls.append(Call(like, reached.autocast, self._seed))
            return len(micros), calls

        everyone = self._place.together(begin)
        counts = [count for count, _ in everyone]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes of one pipeline got {counts} micro-batches in a window: they must read the same data."
            )
        return micros, everyone[0][1], inputs

    def join(self, window: Any) -> None:
        """Take part, with zero, in the reduction of a window."""
        self._reduce()

    def exchange(self, values: Sequence[float]) -> PendingRows:
        """Start the message of an update. Raises what broke the schedule: the others wait in it."""
        if self._schedules.broken is not None:
            raise self._schedules.broken
        return super().exchange(values)

    @property
    def _place(self) -> Chain:
        if self._chain is None:
            raise RuntimeError("the pipeline is not set up: call setup() and prepare(model) first.")
        return self._chain

    @property
    def _copies(self) -> dist.ProcessGroup:
        """The processes with the same parts in all pipelines."""
        return self._groups[2]

    def _share_buffers(self) -> None:
        """Begin each window with the buffers of the first pipeline (BatchNorm's statistics)."""
        if self.data_parallel_size > 1:
            for part in self._place.parts.values():
                for buffer in part.buffers():
                    dist.broadcast(buffer, src=self._place.stage, group=self._copies)

    def _reduce(self) -> None:
        """Sum the gradients over the pipelines. A parameter that none of them used keeps the gradient None."""
        if self.data_parallel_size == 1:
            return
        for bucket in buckets(self._parameters, BUCKET_BYTES):
            used = torch.tensor([float(p.grad is not None) for p in bucket])
            values = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
            flat = torch.cat([*values, used.to(values[0])])
            dist.all_reduce(flat, group=self._copies)
            *sums, counts = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])
            for parameter, total, count in zip(bucket, sums, counts.tolist(), strict=True):
                if count:
                    parameter.grad = total.view_as(parameter)

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        """Multiply by `factor`, clip and return the norm; also where this process has no gradient."""
        if any(p.grad is not None for p in self._parameters):
            return super().clip(max_norm, factor)
        return self._norm([]) * factor

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm over all parts: one number is summed."""
        own = super()._norm(gradients) if gradients else torch.zeros((), device=self.device)
        squared = own.double() ** 2
        dist.all_reduce(squared, group=self._place.group)
        return squared.sqrt()

    def fingerprint(self) -> int:
        """Return a number that is the same on all processes when all pipelines hold the same model."""
        total = torch.tensor(super().fingerprint())
        dist.all_reduce(total, group=self._place.host_group)
        return int(total)

    # Evaluation

    def evaluate(
        self, compute: Callable[[nn.Module, Any], Mapping[str, Any]], model: nn.Module, batch: Any
    ) -> Mapping[str, Any]:
        """Return `compute(model, batch)` on the last process of a pipeline, and nothing on the others."""
        if not self._is_prepared(model):
            self.prepare(model)
        on_batch, x, autocast = partial(compute, self._pipelined, batch), None, None
        if self._place.is_first:
            reached = self._pipelined.input_of(on_batch)
            x, autocast = reached.input, reached.autocast
        output, _ = self._place.through(x, autocast)
        return {} if output is None else self._pipelined.with_output(output, on_batch)

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Give all pipelines the buffers of the first."""
        if self._is_prepared(model):
            self._share_buffers()

    def _is_prepared(self, model: nn.Module) -> bool:
        return self._chain is not None and self._model is model

    # What a run keeps

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes) of one window's gradients; what passes between the stages is not in it."""
        if self.data_parallel_size == 1:
            return 0, 0
        found = buckets(self._parameters, BUCKET_BYTES)
        return len(found), sum(p.numel() * p.element_size() for bucket in found for p in bucket)

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return the whole model's state, gathered from the parts, on all processes together."""
        everything = self._model.state_dict()
        mine: dict[str, Any] = {"model": {plain: everything[name] for plain, name in self._names(own=True).items()}}
        if optimizer is not None:
            mine["optimizer"] = named_state(self._model, optimizer)
        mine = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), mine)
        parts = self._place.gather(mine)
        found = {name: value for part in parts for name, value in part["model"].items()}
        state: dict[str, Any] = {"model": {name: found[name] for name in self._names()}}
        if optimizer is not None:
            states = {name: value for part in parts for name, value in part["optimizer"]["state"].items()}
            state["optimizer"] = {
                "state": {name: states[name] for name in self._names() if name in states},
                "param_groups": mine["optimizer"]["param_groups"],
            }
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Load this process's parts of a whole model's state. Raises RuntimeError or ValueError for another's."""
        if differing := {*state["model"]} ^ {*self._names()}:
            raise RuntimeError(f"the state is of another model: {', '.join(sorted(differing)[:3])} is in one of them.")
        for child_name, child in self._children.items():
            prefix = f"{child_name}."
            names = {plain: name for plain, name in self._names().items() if name.startswith(prefix)}
            child.load_state_dict({name.removeprefix(prefix): state["model"][plain] for plain, name in names.items()})
        if optimizer is not None:
            saved = state["optimizer"]
            states = {name: value for name, value in saved["state"].items() if name in self._names(own=True)}
            load_named_state(self._model, optimizer, {**saved, "state": states})

    def _names(self, own: bool = False) -> dict[str, str]:
        """Return the names in the whole model's state, in order, and those under `torch.compile`; or the own ones."""
        names = [name for name in self._model.state_dict() if not own or name.partition(".")[0] in self._children]
        return {name.replace("_orig_mod.", ""): name for name in names}


def _check_count(name: str, value: object, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}; {why}.")
