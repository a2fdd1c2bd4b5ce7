"""Schedules: the number of micro-batches of a window, as a pure function of the position in the run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any, Literal, get_args

from engine.errors import UserError, check_count

Unit = Literal["epoch", "update", "sample"]
EffectiveBatch = Callable[[int, int], int]  # a strategy's: from N and K to the samples of a full window


@dataclass(frozen=True, slots=True)
class Stage:
    """The settings from `first` (in the schedule's unit) until the next stage."""

    first: int
    accumulate_grad_batches: int  # K, the micro-batches per process and window
    effective_batch: int  # the samples of a full window over all processes
    lr_factor: float = 1.0  # the factor on the learning rate of the optimizer and its schedule


def check_accumulation(value: object, name: str = "accumulate_grad_batches") -> None:
    """Raise UserError unless `value` can be K."""
    check_count(name, value, why="Use 1 to update after each micro-batch.")


def check_scheduling(scheduling: object, unit: str = "epoch") -> dict[int, int]:
    """Return a checked copy of `{first epoch (or update, or sample): K}`, in ascending order, from 0.

    K is 1 until the first key. Raises UserError except for whole numbers, keys of at least 0 and K of at least 1.
    """
    if unit not in get_args(Unit):
        raise UserError(f"unit={unit!r}: a schedule counts by one of {', '.join(get_args(Unit))}.")
    if not isinstance(scheduling, Mapping) or not scheduling:
        raise UserError(f"scheduling={scheduling!r}: give a dictionary such as {{0: 8, 4: 4, 8: 1}}, {unit} -> K.")
    for first, K in scheduling.items():
        check_count(f"scheduling: {unit}", first, 0)
        check_accumulation(K, f"scheduling[{first}]")
    return dict(sorted({0: 1, **scheduling}.items()))


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, in ascending order, the first at 0."""

    stages: tuple[Stage, ...]
    unit: Unit = "epoch"

    def at(self, epoch: int, update: int, sample: int) -> Stage:
        """Return the stage at this position of the run; `sample` counts those since the start."""
        if len(self.stages) == 1:
            return self.stages[0]
        return self.stages[self.index(epoch, update, sample)]

    def index(self, epoch: int, update: int, sample: int) -> int:
        """Return the index of that stage."""
        place = {"epoch": epoch, "update": update, "sample": sample}[self.unit]
        return bisect_right(self.firsts, place) - 1

    @cached_property
    def firsts(self) -> list[int]:
        """The first sample, update or epoch of each stage."""
        return [stage.first for stage in self.stages]

    def cut(self, N: int, effective_batch: EffectiveBatch) -> Schedule:
        """Return the same effective batches in micro-batches of N: K is that of the busiest process."""
        share = effective_batch(N, 1)
        stages = (replace(s, accumulate_grad_batches=-(-s.effective_batch // share)) for s in self.stages)
        return replace(self, stages=tuple(stages))

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the samples of each update, whatever P and K are."""
        return {"unit": self.unit, "effective_batches": {stage.first: stage.effective_batch for stage in self.stages}}


def make_schedule(
    N: int, effective_batch: EffectiveBatch, scheduling: Mapping[int, int], unit: Unit = "epoch", B: int | None = None
) -> Schedule:
    """Return the stages of `{first: K}`, or of one effective batch B; `effective_batch(N, K)` is the strategy's."""
    if B is not None:
        return solve({0: B}, N, effective_batch)
    return Schedule(tuple(Stage(first, K, effective_batch(N, K)) for first, K in scheduling.items()), unit)


def solve(batches: Mapping[int, int], N: int, effective_batch: EffectiveBatch, unit: Unit = "epoch") -> Schedule:
    """Return the stages of `{first: samples of a full window}`: K follows."""
    return Schedule(tuple(Stage(first, 1, B) for first, B in batches.items()), unit).cut(N, effective_batch)


def differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return how two runs differ. The same effective batches are the same windows, however they were asked for."""
    now, before = here["identity"], saved["identity"]
    changed = [name for name, text in now.items() if text != before.get(name)]
    found = [f"{name} was {before.get(name)} and is {now[name]}" for name in changed if name not in ASKED]
    if ASKED.intersection(changed) and here["schedule"] != saved["schedule"]:
        was, now_is = (
            f"{', '.join(map(str, run['schedule']['effective_batches'].values()))} samples ({_asked(run['identity'])})"
            for run in (saved, here)
        )
        found.append(f"an update was {was} and is {now_is}")
    return found


ASKED = {"accumulate_grad_batches", "effective_batch_size", "scheduling", "scheduling_unit"}
"""The settings that ask for effective batches."""


def _asked(identity: Mapping[str, str]) -> str:
    B, scheduling = identity["effective_batch_size"], identity["scheduling"]
    if B != "None":
        return f"effective_batch_size={B}"
    is_constant = "," not in scheduling
    return f"accumulate_grad_batches={scheduling[4:-1] if is_constant else scheduling}"


# The factor on the learning rate, from (effective batch) / (reference)
LR_RULES: dict[str, Callable[[float], float]] = {"none": lambda times: 1.0, "linear": lambda times: times, "sqrt": sqrt}


def check_lr_rule(rule: object, reference_batch: object) -> None:
    """Raise UserError for an unknown rule, a rule without a reference, and a reference without a rule."""
    if not isinstance(rule, str) or rule not in LR_RULES:
        raise UserError(f"lr_rule={rule!r}: expected one of {', '.join(LR_RULES)}.")
    if rule == "none":
        if reference_batch is not None:
            raise UserError(f"lr_reference_batch={reference_batch!r} without an lr_rule. Use linear or sqrt.")
    elif reference_batch is None:
        what = f"lr_rule={rule!r} with lr_reference_batch=None"
        raise UserError(f"{what}: expected the effective batch, in samples, of the task's learning rate.")


def with_lr_rule(schedule: Schedule, rule: str, reference_batch: int | None) -> Schedule:
    """Return the schedule with each stage's LR factor, of its nominal effective batch against the reference."""
    if reference_batch is None:
        return schedule
    factor = LR_RULES[rule]
    stages = (replace(stage, lr_factor=factor(stage.effective_batch / reference_batch)) for stage in schedule.stages)
    return replace(schedule, stages=tuple(stages))
