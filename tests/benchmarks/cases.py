"""The strategies that are measured, and the model that all of them train: layers in a row, so that it can be cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies import DDPStrategy, DPStrategy, FSDPStrategy, PipelineStrategy, SingleDeviceStrategy, Strategy


class Layer(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def tower(layers: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(*(Layer(width, dtype) for _ in range(layers)))


class DDPAtOnce(DDPStrategy):
    """Reduces at each micro-batch, as a loop without `no_sync` does: for comparison, where all have equally many."""

    defers_reduction = False

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        return super().accumulation_context(True)


class Case(NamedTuple):
    """A strategy on so many processes."""

    name: str
    processes: int
    make: Callable[[int], Strategy]
    """Of K."""
    least: Callable[[float, float, int], float] = lambda G, a, K: 0
    """The fewest bytes that a process can give to collectives in an update: of G, those of all gradients, of a, those
    that pass between two layers in a micro-batch, and of K."""
    then: tuple[str, int] | None = None
    """As what a run that it began goes on: another one here, on so many processes."""
    smallest_window: int = 1


def ddp(name: str = "", make: type[DDPStrategy] = DDPStrategy, then: Any = None, **options: Any) -> Case:
    sends_parameters = options.get("shard_optimizer", False)
    return Case(
        f"ddp{name}",
        2,
        lambda K: make(device="cpu", **options),
        lambda G, a, K: G * (1 + sends_parameters),
        then,
    )


def fsdp(name: str = "", processes: int = 2, then: Any = None, **options: Any) -> Case:
    """Gradients go once, parameters come once; replicas add up the shards that they have two of."""
    replicas = processes / options["shard_size"] if "shard_size" in options else 1
    return Case(
        f"fsdp{name}",
        processes,
        lambda K: FSDPStrategy(device="cpu", wrap=["Layer"], **options),
        lambda G, a, K: 2 * G + (G / options["shard_size"] if replicas > 1 else 0),
        then,
    )


def pipeline(schedule: Any, P: int = 1, then: Any = None) -> Case:
    """Over two stages each of them sends once over each boundary, forward or back; copies add up what each has."""
    return Case(
        f"pipeline, {schedule}{f', P={P}' if P > 1 else ''}",
        2 * P,
        lambda K: PipelineStrategy(2, schedule, K, device="cpu"),
        lambda G, a, K: a * K + (G / 2 if P > 1 else 0),
        then,
        smallest_window=1 if schedule == "GPipe" else 2,
    )


CASES = (
    Case("single", 1, lambda K: SingleDeviceStrategy("cpu"), then=("ddp", 3)),
    Case("dp, 2 CPU devices", 1, lambda K: DPStrategy(2, "cpu"), then=("single", 1)),
    ddp(then=("ddp", 4)),
    ddp(", find_unused_parameters", find_unused_parameters=True, then=("ddp", 3)),
    ddp(", gradient_as_bucket_view", gradient_as_bucket_view=True, then=("ddp", 1)),
    ddp(", shard_optimizer", shard_optimizer=True, then=("ddp, shard_optimizer", 3)),
    ddp(", both of these", gradient_as_bucket_view=True, shard_optimizer=True, then=("fsdp", 3)),
    fsdp(then=("fsdp", 4)),
    fsdp(", reshard_after_forward=False", reshard_after_forward=False, then=("ddp", 3)),
    fsdp(", reduce=micro_batch", reduce="micro_batch", then=("single", 1)),
    fsdp(", shard_size=2", 4, shard_size=2, then=("fsdp", 3)),
    pipeline("GPipe", then=("single", 1)),
    pipeline("1F1B", then=("fsdp", 2)),
    pipeline("1F1B", P=2, then=("ddp", 3)),
)
AT_ONCE = ddp(", each micro-batch reduced", DDPAtOnce)
NAMED = {case.name: case for case in CASES}
