"""Strategies that are DDP but for one defect each: what the conformance kit must find, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies import DDPStrategy
from strategies.base import Strategy


class ReducesEachMicroBatch(DDPStrategy):
    def accumulation_context(self, is_last_microbatch: bool) -> Any:
        return super().accumulation_context(True)


class DefersTheLast(DDPStrategy):
    def accumulation_context(self, is_last_microbatch: bool) -> Any:
        return super().accumulation_context(not is_last_microbatch)


class Averages(DDPStrategy):
    def backward(self, loss: Tensor, scale: Any) -> None:
        super().backward(loss, scale / self.data_parallel_size)


class LooksAtEachLoss(DDPStrategy):
    def backward(self, loss: Tensor, scale: Any) -> None:
        loss.item()
        super().backward(loss, scale)


class KeepsGradients(DDPStrategy):
    def clear_gradients(self) -> None:
        pass


class ForgetsFactor(DDPStrategy):
    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        return super().clip(max_norm)


class NormAfterClipping(DDPStrategy):
    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        super().clip(max_norm, factor)
        return super().clip(None)


class HidesNaN(DDPStrategy):
    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        return super().clip(max_norm, factor).nan_to_num()


class OneProcessOnly(DDPStrategy):
    def effective_batch(self, N: int, K: int) -> int:
        return N * K


class NeverJoins(DDPStrategy):
    def __init__(self) -> None:
        super().__init__(timeout_seconds=10)  # which the others wait

    def join(self, window: Any) -> None:
        pass


class AsManyAsTheFirst(DDPStrategy):
    """Claims variable windows, and runs no more micro-batches than its first window had."""

    def run_window(self, window: Any, forward: Any) -> None:
        micros = list(window)
        self.K = getattr(self, "K", len(micros))
        kept = micros[: self.K]
        super().run_window([replace(micro, is_last=micro is kept[-1]) for micro in kept], forward)


class OwnNames(DDPStrategy):
    def state_dict(self, optimizer: Any = None) -> dict[str, Any]:
        state = super().state_dict(optimizer)
        return {**state, "model": {f"module.{name}": value for name, value in state["model"].items()}}

    def load_state_dict(self, state: dict[str, Any], optimizer: Any = None) -> None:
        own = {name.removeprefix("module."): value for name, value in state["model"].items()}
        super().load_state_dict({**state, "model": own}, optimizer)


class ForgetsOptimizer(DDPStrategy):
    def load_state_dict(self, state: dict[str, Any], optimizer: Any = None) -> None:
        super().load_state_dict(state)


class LastFirst(DDPStrategy):
    def exchange(self, values: Any) -> Any:
        receive = super().exchange(values)
        return lambda: receive()[::-1]


class OwnBuffers(DDPStrategy):
    def synchronize_buffers(self, model: Any) -> None:
        pass


class KnownLate(DDPStrategy):
    @property
    def rank(self) -> int:
        return super().rank if torch.distributed.is_initialized() else 0


class Defect(NamedTuple):
    """A class, the check that must be red first, words of what it says, and the other checks that are red too."""

    strategy: type[Strategy]
    check: str
    says: str
    others: str = ""


RUNS = "exact weights_known_late variable_windows change_of_P not_finite"
DEFECTS = [
    Defect(KnownLate, "declared", "process 1: rank is 0 before setup() and 1 after", "uneven_data error"),
    Defect(LastFirst, "messages", "process 0: exchange: expected [[0, 0.0, 0.0, 0, 0], [1, 0.5, 0.0, 1, -1]], seen [["),
    Defect(
        OneProcessOnly,
        "effective_batch",
        "says 8, and P=2 processes with K=4 micro-batches of N=2 have 16",
        f"nothing_per_microbatch {RUNS}",
    ),
    Defect(
        Averages,
        "backward",
        "the gradient is 0.5 times the length of the one expected",
        f"clear_gradients clip {RUNS} uneven_data",
    ),
    Defect(
        DefersTheLast,
        "backward",
        "of the one expected, off by",
        "effective_batch clear_gradients clip one_reduction nothing_per_microbatch "
        f"{RUNS} uneven_data round_trip resume error",
    ),
    Defect(
        KeepsGradients,
        "clear_gradients",
        "two windows with clear_gradients() between them: the gradient is",
        f"clip {RUNS} uneven_data round_trip resume",
    ),
    Defect(
        ForgetsFactor,
        "clip",
        "clip(None, 0.25): the gradient is 4 times the length",
        "weights_known_late uneven_data",
    ),
    Defect(NormAfterClipping, "clip", "clip(0.1, 1.0) returned the norm 0.09999"),
    Defect(OwnBuffers, "synchronize_buffers", "process 1: expected the 0 of process 0 in the buffer, seen 1"),
    Defect(
        ReducesEachMicroBatch,
        "one_reduction",
        "a window of K=4 micro-batches has 4 reductions",
        "exact weights_known_late uneven_data error",
    ),
    Defect(LooksAtEachLoss, "nothing_per_microbatch", "seen (K: syncs) {1: "),
    Defect(AsManyAsTheFirst, "variable_windows", "K by epoch {0: 2, 1: 4, 2: 1}: expected updates of [8, 8"),
    Defect(
        NeverJoins,
        "uneven_data",
        "streams of [6, 1] micro-batches: expected all processes to end",
        "exact weights_known_late variable_windows error",
    ),
    Defect(OwnNames, "names", "model has the names ['module.0.weight', 'module.0.bias']", "change_of_P"),
    Defect(ForgetsOptimizer, "round_trip", "['state']['0.weight']['step'] is not what was saved", "resume"),
    Defect(HidesNaN, "not_finite", "expected to skip the second update alone, seen [0, 0, 0]"),
]
