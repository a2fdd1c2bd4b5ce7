"""Windows as torch.distributed.pipelining runs them: schedules that are built for a number of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from strategies.pipeline.chain import Chain
from strategies.pipeline.parts import Call, Part, PipelinedModel, TensorSpec, already_computed, zeros

ScheduleName = Literal["GPipe", "1F1B", "Interleaved1F1B"]

KEPT = 4
"""Schedules that stay built, for each keeps what it receives into: a full window's, its tail's, a ragged piece's."""

PART_SEED = 0x9E3779B185EBCA87
"""Sets apart the draws of a model's parts, which are all seeded for the same micro-batch."""


def takes(schedule: ScheduleName, stages: int, count: int) -> bool:
    """Whether a schedule over so many processes can run `count` micro-batches."""
    if schedule == "GPipe":
        return True
    return count >= stages and (schedule == "1F1B" or count % (count // stages) == 0)


class Run(NamedTuple):
    """Micro-batches of one kind, which a schedule runs."""

    calls: Sequence[Call]
    inputs: Sequence[Tensor]
    """On the first process."""
    forwards: Sequence[Callable[[], tuple[Tensor, float | Tensor]]]
    likes: Sequence[TensorSpec]
    """What each part gives."""


class Schedules:
    """Runs micro-batches forward and backward through a chain, by the schedule of that name.

    What a user's code raises in a forward is kept until the schedule is over: the other processes are in it too.
    """

    def __init__(self, name: ScheduleName, chain: Chain, model: PipelinedModel, seed: Callable[[int], None]) -> None:
        self._name = name
        self._chain = chain
        self._model = model
        self._seed = seed
        self._built: dict[tuple[Any, ...], Any] = {}
        self._likes: dict[tuple[Any, ...], list[TensorSpec]] = {}
        self._run: Run
        self._error: Exception | None = None
        self.broken: Exception | None = None
        """What ended a schedule in its middle: a backward, or another process."""

    def run(
        self,
        calls: Sequence[Call],
        inputs: Sequence[Tensor],
        forwards: Sequence[Callable[[], tuple[Tensor, float | Tensor]]],
    ) -> None:
        """Run a window: a schedule for each row of micro-batches that are called alike.

        Raises, when all is over, what one of them raised on this process.
        """
        self._error = None
        for kind, row in groupby(range(len(calls)), key=lambda index: calls[index][:2]):
            places = list(row)
            if kind not in self._likes:
                self._likes[kind] = self._chain.likes(inputs[places[0]] if inputs else None, calls[places[0]].autocast)
            schedule = self._schedule(kind, len(places))
            self._run = Run(
                [calls[place] for place in places],
                [inputs[place] for place in places if inputs],
                [forwards[place] for place in places],
                self._likes[kind],
            )
            numbers = torch.arange(len(places))
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

    def _compute(self, number: int, activation: Tensor | None, index: int) -> Tensor:
        """Return the output of a part for a micro-batch, or the loss; zero after an error."""
        run = self._run
        if self._error is None:
            try:
                x, call = run.inputs[index] if activation is None else activation, run.calls[index]
                self._seed((call.seed + (number + 1) * PART_SEED) & 0xFFFFFFFFFFFFFFFF)
                output: Tensor = self._chain.call(number, x, call.autocast)  # of the last part, anything
                if number == self._chain.last:
                    loss, scale = self._model.with_output(output, run.forwards[index])
                    return loss * scale
                if TensorSpec(tuple(output.shape), output.dtype) != run.likes[number]:
                    raise ValueError(
                        f"part {number} of the pipeline returned {output.dtype} {tuple(output.shape)}, and "
                        f"{tuple(run.likes[number])} before for such an input: shapes must not depend on values."
                    )
                return output.contiguous()
            except Exception as error:
                self._error = error
        return zeros(run.likes[number], self._chain.device)

    def _schedule(self, kind: tuple[Any, ...], count: int) -> Any:
        """Return the schedule of `count` micro-batches of one kind: built before, else now."""
        built = self._built.pop((*kind, count), None) or self._build(self._likes[kind], count)
        while len(self._built) >= KEPT:
            del self._built[next(iter(self._built))]
        self._built[*kind, count] = built
        return built

    def _build(self, likes: Sequence[TensorSpec], count: int) -> Any:
        """Return a schedule; of a window that is too short for the one asked for, one without its condition."""
        from torch.distributed import pipelining  # its import takes a second

        chain = self._chain
        stages: Any = [
            pipelining.PipelineStage(
                Part(partial(self._compute, number)),
                number,
                chain.last + 1,
                chain.device,
                input_args=() if number == 0 else zeros(likes[number - 1], chain.device),
                output_args=zeros(likes[number], chain.device),
                group=chain.group,
            )
            for number in chain.parts
        ]
        is_fit = takes(self._name, len(chain.ranks), count)
        if self._name == "Interleaved1F1B":
            looped = pipelining.ScheduleInterleaved1F1B if is_fit else pipelining.ScheduleLoopedBFS
            return looped(stages, count, already_computed, scale_grads=False)
        single = pipelining.Schedule1F1B if self._name == "1F1B" and is_fit else pipelining.ScheduleGPipe
        return single(stages[0], count, already_computed, scale_grads=False)
