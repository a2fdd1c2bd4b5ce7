"""Several processes that share one model, layer after layer: torch.distributed.pipelining, one schedule per window."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from strategies.base import MicroBatch, Strategy
from strategies.environment import started_processes
from strategies.optimizer_state import load_named_state, named_state
from strategies.pipeline_parts import (
    Call,
    ElsewhereError,
    Like,
    Part,
    PipelinedModel,
    already_computed,
    buckets,
    cut,
    zeros,
)
from strategies.processes import ProcessGroupStrategy
from strategies.single import NOTHING_TO_DEFER

ScheduleName = Literal["GPipe", "1F1B", "Interleaved1F1B"]
Forward = Callable[[Any], tuple[Tensor, float | Tensor]]
T = TypeVar("T")

BUCKET_BYTES = 25 << 20
"""Gradients are reduced over the data-parallel processes in pieces of about this size, as DDP does."""

KEPT_SCHEDULES = 4
"""How many schedules stay built: each keeps what it receives into. A full window, its tail, a ragged micro-batch."""

PART_SEED = 0x9E3779B185EBCA87
"""Sets apart the draws of a model's parts, which are all seeded for the same micro-batch."""


class Run(NamedTuple):
    """The micro-batches of one kind that a schedule runs."""

    calls: list[Call]
    inputs: list[Tensor]
    """On the first process."""
    forwards: list[Callable[[], tuple[Tensor, float | Tensor]]]
    likes: list[Like]
    """What each part gives."""


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
    evaluates_alone = False
    holds_all = False

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
        if not self._takes(micro_batches):
            rounds = "" if schedule == "1F1B" else f", and a multiple of micro_batches // {stages}"
            raise ValueError(
                f"micro_batches={micro_batches}: {schedule} over {stages} stages needs at least {stages}{rounds}. "
                "Use GPipe, or another number."
            )
        self._schedules: dict[tuple[Any, ...], Any] = {}
        self._likes: dict[tuple[Any, ...], list[Like]] = {}
        self._groups: list[dist.ProcessGroup] = []
        self._broken: Exception | None = None

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
        """Join the processes: all, those of this pipeline, and those with the same parts in the others."""
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
            dist.new_subgroups_by_enumeration(ranks, timeout=self.timeout, backend=backend)[0]
            for ranks, backend in kinds
        ]
        self._pipeline, self._pipeline_host, self._copies = self._groups
        self._stage = self.rank % S
        self._broken = None

    def teardown(self) -> None:
        """Destroy the groups that `setup` made."""
        self._schedules.clear()
        gc.collect()
        if not self._owns_group and dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []
        super().teardown()

    # The model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cut `model`, keep this process's parts and return the module to call. Raises ValueError where it cannot."""
        parts = cut(model, self.stages * self.parts_per_process, self.boundaries)
        self._last = len(parts) - 1
        self._children = {name: child for part in parts[self._stage :: self.stages] for name, child in part}
        for child in model.children():
            child.to(self.device if any(child is own for own in self._children.values()) else "meta")
        self._mine = {
            number: nn.Sequential(*(child for _, child in parts[number]))
            for number in range(self._stage, len(parts), self.stages)
        }
        self._parameters = list(dict.fromkeys(p for part in self._mine.values() for p in part.parameters()))
        self._model = model
        self._pipelined = PipelinedModel(model)
        self._schedules.clear()
        self._likes.clear()
        return self._pipelined

    @property
    def _is_first(self) -> bool:
        return self._stage == 0

    @property
    def _is_last(self) -> bool:
        return self._stage == self.stages - 1

    # One window

    def seed(self, value: int) -> None:
        """Seed the generators; each part of the model then draws from a stream of its own."""
        self._seed = value
        super().seed(value)

    def run_window(self, window: Iterable[MicroBatch], forward: Forward) -> None:
        """Run one window by the schedule, and sum its gradients over the pipelines.

        `forward` runs up to the model on the first process, and past it on the last. Where one process fails, all end
        the window, so that they can hear of it.
        """
        self._share_buffers()
        try:
            self._run(window, forward)
        except ElsewhereError:
            pass  # that process tells of it
        self._reduce()

    def _run(self, window: Iterable[MicroBatch], forward: Forward) -> None:
        micros: list[MicroBatch] = []
        inputs: list[Tensor] = []

        def begin() -> tuple[int, list[Call]]:
            micros.extend(window)
            calls = []
            for micro in micros if self._is_first else ():
                reached = self._pipelined.input_of(partial(forward, micro))
                inputs.append(reached.input)
                like = Like(tuple(reached.input.shape), reached.input.dtype)
                calls.append(Call(like, reached.autocast, self._seed))
            return len(micros), calls

        everyone = self._together(begin)
        counts, calls = [count for count, _ in everyone], everyone[0][1]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes of one pipeline got {counts} micro-batches in a window: they must read the same data."
            )
        self._error: Exception | None = None
        for kind, run in groupby(range(len(calls)), key=lambda index: calls[index][:2]):
            indices = list(run)
            if kind not in self._likes:
                self._likes[kind] = self._find_likes(inputs[indices[0]] if inputs else None, kind[1])
            schedule = self._schedule(kind, len(indices))
            self._now = Run(
                [calls[i] for i in indices],
                [inputs[i] for i in indices] if inputs else [],
                [partial(forward, micros[i]) for i in indices],
                self._likes[kind],
            )
            numbers = torch.arange(len(indices))
            try:
                schedule.step(target=numbers, return_outputs=False, micro=numbers)
            except Exception as error:  # in a backward, or another process is gone: the schedule cannot be gone on with
                self._broken = error
                raise
            finally:
                del self._now
        if self._error is not None:
            raise self._error

    def join(self, window: Any) -> None:
        """Take part, with zero, in the reduction of a window. Raises what broke the schedule, if anything did."""
        if self._broken is not None:
            raise self._broken
        self._reduce()

    def _schedule(self, kind: tuple[Any, ...], count: int) -> Any:
        """Return the schedule of `count` micro-batches of one kind: a built one, else it is built."""
        from torch.distributed import pipelining  # its import takes a second

        key = (*kind, count)
        built = self._schedules.pop(key, None)
        if built is None:
            likes = self._likes[kind]
            stages = [
                pipelining.PipelineStage(
                    Part(partial(self._compute, number)),
                    number,
                    self._last + 1,
                    self.device,
                    input_args=() if number == 0 else zeros(likes[number - 1], self.device),
                    output_args=zeros(likes[number], self.device),
                    group=self._pipeline,
                )
                for number in self._mine
            ]
            options: dict[str, Any] = {
                "n_microbatches": count,
                "loss_fn": already_computed,
                "scale_grads": False,
            }
            if self.schedule == "Interleaved1F1B":
                looped = pipelining.ScheduleInterleaved1F1B if self._takes(count) else pipelining.ScheduleLoopedBFS
                built = looped(list(stages), **options)
            else:
                single = pipelining.Schedule1F1B if self.schedule == "1F1B" and self._takes(count) else pipelining.ScheduleGPipe
                built = single(stages[0], **options)
            while len(self._schedules) >= KEPT_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
        self._schedules[key] = built
        return built

    def _takes(self, count: int) -> bool:
        """Whether the schedule can run so many micro-batches; a short window that it cannot runs as GPipe does."""
        if self.schedule == "GPipe":
            return True
        return count >= self.stages and (self.schedule == "1F1B" or count % (count // self.stages) == 0)

    def _compute(self, number: int, activation: Tensor | None, index: int) -> Tensor:
        """Return the output of a part for a micro-batch, or the loss.

        After an error it is zero, so that the schedule ends on all processes.
        """
        now = self._now
        if self._error is None:
            try:
                x = now.inputs[index] if activation is None else activation
                call = now.calls[index]
                super().seed((call.seed + (number + 1) * PART_SEED) & 0xFFFFFFFFFFFFFFFF)
                output = self._call(number, x, call.autocast)
                if number == self._last:
                    loss, scale = self._pipelined.with_output(output, now.forwards[index])
                    return loss * scale
                if Like(tuple(output.shape), output.dtype) != now.likes[number]:
                    raise ValueError(
                        f"part {number} of the pipeline returned {output.dtype} {tuple(output.shape)} and "
                        f"{now.likes[number]} for the same input shape: shapes between parts must not depend on values."
                    )
                return output.contiguous()
            except Exception as error:
                self._error = error
        return zeros(now.likes[number], self.device)

    def _call(self, number: int, x: Tensor, autocast: torch.dtype | None) -> Any:
        with torch.autocast(self._device_type, dtype=autocast, enabled=autocast is not None):
            output = self._mine[number](x)
        if number != self._last and not isinstance(output, Tensor):
            raise ValueError(
                f"part {number} of the pipeline ends with a {type(output).__name__}: one tensor passes to the next. "
                "Set boundaries between children where it does."
            )
        return output

    def _find_likes(self, x: Tensor | None, autocast: torch.dtype | None) -> list[Like]:
        """Return what each part gives for an input, from one forward without gradients that leaves no trace."""
        buffers = [buffer for part in self._mine.values() for buffer in part.buffers()]

        def run() -> dict[int, Like]:
            kept = [buffer.clone() for buffer in buffers]
            with torch.no_grad():
                _, likes = self._through(x, autocast)
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
            return likes

        found = {number: like for likes in self._together(run) for number, like in likes.items()}
        loss = Like((), torch.float32)
        return [*(found[number] for number in range(self._last)), loss]

    def _through(self, x: Tensor | None, autocast: torch.dtype | None) -> tuple[Any, dict[int, Like]]:
        """Run one batch through all parts; return the model's output, on the last process, and what each part gave.

        A part that fails passes None on: the output is None then.
        """
        error, likes = None, {}
        for number, part in self._mine.items():
            if number > 0:
                x, autocast = self._receive()
            if x is not None and error is None:
                try:
                    x = self._call(number, x, autocast)
                except Exception as raised:
                    error, x = raised, None
            if number == self._last:
                break
            if x is not None:
                likes[number] = Like(tuple(x.shape), x.dtype)
            self._send(x, autocast)
        if error is not None:
            raise error
        return x, likes

    def _send(self, x: Tensor | None, autocast: torch.dtype | None) -> None:
        """Send a tensor of any shape to the next process of the pipeline."""
        to = self.rank + 1 if not self._is_last else self.rank + 1 - self.stages
        what = None if x is None else (Like(tuple(x.shape), x.dtype), autocast)
        dist.send_object_list([what], dst=to, group=self._pipeline_host)
        if x is not None:
            dist.send(x.contiguous(), dst=to, group=self._pipeline)

    def _receive(self) -> tuple[Tensor | None, torch.dtype | None]:
        source = self.rank - 1 if not self._is_first else self.rank - 1 + self.stages
        what: list[Any] = [None]
        dist.recv_object_list(what, src=source, group=self._pipeline_host)
        if what[0] is None:
            return None, None
        like, autocast = what[0]
        x = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        dist.recv(x, src=source, group=self._pipeline)
        return x, autocast

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on all processes of the pipeline; return what each returned, in order of stages.

        Raises what it raised here, and ElsewhereError where it raised on another.
        """
        error, value = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        rows: list[Any] = [None] * self.stages
        dist.all_gather_object(rows, (error is None, value), group=self._pipeline_host)
        if error is not None:
            raise error
        if not all(is_good for is_good, _ in rows):
            raise ElsewhereError
        return [value for _, value in rows]

    def _share_buffers(self) -> None:
        """Begin each window with the buffers of the first pipeline (BatchNorm's statistics)."""
        if self.data_parallel_size > 1:
            for part in self._mine.values():
                for buffer in part.buffers():
                    dist.broadcast(buffer, src=self._stage, group=self._copies)

    def _reduce(self) -> None:
        """Sum the gradients over the pipelines. A parameter that none of them used keeps the gradient None."""
        if self.data_parallel_size == 1:
            return
        for bucket in buckets(self._parameters, BUCKET_BYTES):
            used = torch.tensor([float(p.grad is not None) for p in bucket])
            values = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
            flat = torch.cat([*values, used.to(values[0])])
            dist.all_reduce(flat, group=self._copies)
            *sums, counts = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, total, count in zip(bucket, sums, counts.tolist(), strict=True):
                if count:
                    parameter.grad = total.view_as(parameter)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the 2-norm of the gradients of all parts."""
        squared = super().norm(gradients).double() ** 2
        dist.all_reduce(squared, group=self._pipeline)
        return squared.sqrt()

    def fingerprint(self) -> int:
        """Return a number that is the same on all processes when all pipelines hold the same model."""
        total = torch.tensor(super().fingerprint())
        dist.all_reduce(total, group=self._pipeline_host)
        return int(total)

    # Evaluation

    def evaluate(
        self, compute: Callable[[nn.Module, Any], Mapping[str, Any]], model: nn.Module, batch: Any
    ) -> Mapping[str, Any]:
        """Return `compute(model, batch)` on the last process of a pipeline, and nothing on the others."""
        if getattr(self, "_model", None) is not model:
            self.prepare(model)
        on_batch, x, autocast = partial(compute, self._pipelined, batch), None, None
        if self._is_first:
            reached = self._pipelined.input_of(on_batch)
            x, autocast = reached.input, reached.autocast
        output, _ = self._through(x, autocast)
        return self._pipelined.with_output(output, on_batch) if self._is_last and output is not None else {}

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Give all pipelines the buffers of the first."""
        if getattr(self, "_model", None) is model:
            self._share_buffers()

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
        parts: list[Any] = [None] * self.stages
        dist.all_gather_object(parts, mine, group=self._pipeline_host)
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
        """Load this process's parts of a whole model's state. Raises RuntimeError or ValueError where it is another's."""
        if differing := {*state["model"]} ^ {*self._names()}:
            raise RuntimeError(f"the state is of another model: {', '.join(sorted(differing)[:3])} is in one of them.")
        mine = {name: state["model"][plain] for plain, name in self._names(own=True).items()}
        self._model.load_state_dict(mine, strict=False)
        if optimizer is not None:
            saved = state["optimizer"]
            own = self._names(own=True)
            states = {name: value for name, value in saved["state"].items() if name in own}
            load_named_state(self._model, optimizer, {**saved, "state": states})

    def _names(self, own: bool = False) -> dict[str, str]:
        """Return the names in the whole model's state in its order, with those under `torch.compile`; or the own ones."""
        names = [name for name in self._model.state_dict() if not own or name.partition(".")[0] in self._children]
        return {name.replace("_orig_mod.", ""): name for name in names}


def _check_count(name: str, value: object, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}; {why}.")
