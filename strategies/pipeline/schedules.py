"""Schedules of torch.distributed.pipelining: built for a number of micro-batches of one shape, and kept for later."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from strategies.errors import UserError
from strategies.pipeline.chain import Chain
from strategies.pipeline.parts import Call, Part, PipelinedModel, TensorSpec, zeros
from strategies.torch_internals import check_activations, expect_gradient, make_schedule

ScheduleName = Literal["GPipe", "1F1B"]
Forward = Callable[[], tuple[Tensor, float | Tensor]]  # returns a micro-batch's loss and the scale of its gradient

# Schedules that stay built. Each keeps its receive buffers: for full windows, short ones, and ragged micro-batches
KEPT = 4

PART_SEED = 0x9E3779B185EBCA87  # separates the draws of the parts, which are all seeded for the same micro-batch


def takes(schedule: ScheduleName, stages: int, count: int) -> bool:
    """Whether a schedule over `stages` processes can run `count` micro-batches."""
    return schedule == "GPipe" or count >= stages


class Run(NamedTuple):
    """Micro-batches of one shape, which a schedule runs."""

    calls: Sequence[Call]
    inputs: Sequence[Tensor]  # on the first process; elsewhere empty
    forwards: Sequence[Forward]
    specs: Sequence[TensorSpec]  # the output of each part


class Schedules:
    """Runs micro-batches through a chain. An error waits until the schedule ends: the others are in it too."""

    def __init__(self, name: ScheduleName, chain: Chain, model: PipelinedModel, seed: Callable[[int], None]) -> None:
        self._name, self._chain, self._model, self._seed = name, chain, model, seed
        self._built: dict[tuple[Any, ...], Any] = {}
        self._specs: dict[tuple[Any, ...], list[TensorSpec]] = {}
        self._run: Run
        self._error: Exception | None = None
        # The error that ended a schedule before its end: in a backward, or in another process
        self.broken: Exception | None = None

    def run(self, calls: Sequence[Call], inputs: Sequence[Tensor], forwards: Sequence[Forward]) -> None:
        """Run a schedule for each group of equal neighbours. Raises a forward's error after the last of them."""
        self._error = None
        for kind, neighbours in groupby(range(len(calls)), key=lambda index: calls[index][:2]):
            indices = list(neighbours)
            if kind not in self._specs:
                x = inputs[indices[0]] if inputs else None
                self._specs[kind] = self._chain.specs(x, calls[indices[0]].autocast)
                check_activations([spec.dtype for spec in self._specs[kind]])
            schedule = self._schedule(kind, len(indices))
            group = slice(indices[0], indices[-1] + 1)
            self._run = Run(calls[group], inputs[group], forwards[group], self._specs[kind])
            numbers = torch.arange(len(indices))
            try:
                schedule.step(target=numbers, return_outputs=False, micro=numbers)
            except Exception as error:
                cause = error.__cause__  # torch describes the tensors of a backward that failed
                self.broken = cause if isinstance(cause, Exception) else error
                raise self.broken from None
            finally:
                del self._run
        if self._error is not None:
            raise self._error

    def _compute(self, activation: Tensor | None, index: int) -> Tensor:
        """Return the output of this part for a micro-batch, or the loss; zeros after an error."""
        run, chain = self._run, self._chain
        spec = run.specs[chain.stage]
        if activation is not None:
            expect_gradient(activation)
        if self._error is None:
            try:
                x, call = run.inputs[index] if activation is None else activation, run.calls[index]
                self._seed((call.seed + (chain.stage + 1) * PART_SEED) & 0xFFFFFFFFFFFFFFFF)
                output: Tensor = chain.call(x, call.autocast)  # any type in the last part
                if chain.is_last:
                    loss, scale = self._model.with_output(output, run.forwards[index])
                    return (loss * scale).float()  # as in `specs`, which torch 2.11 checks; nobody reads the value
                if TensorSpec(tuple(output.shape), output.dtype) != spec:
                    raise UserError(
                        f"part {chain.stage} of the pipeline returned {output.dtype} {tuple(output.shape)}: expected "
                        f"{spec.dtype} {spec.shape}, as before for such an input. Shapes must not depend on values."
                    )
                return output.contiguous()
            except Exception as error:
                self._error = error
        return zeros(spec, chain.device)

    def _schedule(self, kind: tuple[Any, ...], count: int) -> Any:
        """Return the schedule of `count` micro-batches of one kind, and build it if necessary."""
        built = self._built.pop((*kind, count), None) or self._build(self._specs[kind], count)
        while len(self._built) >= KEPT:
            del self._built[next(iter(self._built))]
        self._built[*kind, count] = built
        return built

    def _build(self, specs: Sequence[TensorSpec], count: int) -> Any:
        """Return a schedule: GPipe if there are too few micro-batches for the chosen one."""
        from torch.distributed import pipelining  # its import takes a second

        chain = self._chain
        stage: Any = pipelining.PipelineStage(
            Part(self._compute),
            chain.stage,
            len(chain.ranks),
            chain.device,
            input_args=() if chain.is_first else zeros(specs[chain.stage - 1], chain.device),
            output_args=zeros(specs[chain.stage], chain.device),
            group=chain.group,
        )
        is_1f1b = self._name == "1F1B" and takes(self._name, len(chain.ranks), count)
        schedule = pipelining.Schedule1F1B if is_1f1b else pipelining.ScheduleGPipe
        return make_schedule(schedule, stage, count)
