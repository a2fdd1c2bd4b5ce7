"""The state of a run: everything that moves from update to update, and the requests made of it while it runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass
class RunState:
    """Counters and newest results of a run; a checkpoint holds all fields but `position` under "run"."""

    epoch: int = 0
    """The current epoch, from 0."""
    update: int = 0
    """Updates since the start, skipped ones included."""
    samples: int = 0
    """Samples trained on since the start, over all processes."""
    weight: float = 0.0
    """The weight of those samples: samples, or valid tokens."""
    micro_batch_size: int = 0
    """N: smaller than it was set if memory ran out; 0 until it is known."""
    stream_micro_batch_size: int = 0
    """The most samples of a micro-batch of a stream, if memory ran out; 0: they are as they come."""
    skipped: int = 0
    """Updates skipped since the start."""
    skipped_in_a_row: int = 0
    """Updates skipped since the last finite one, because they were not finite."""
    validated_update: int = 0
    """The update after which `metrics` was measured."""
    started_epoch: int = -1
    """The epoch of the last `on_epoch_start`."""
    finished_epoch: int = -1
    """The epoch of the last `on_epoch_end`."""
    seconds: float = 0.0
    """Seconds of running up to the last `stop_clock`, earlier starts included."""
    record: dict[str, Any] = field(default_factory=dict)
    """The record of the last update: one line of metrics.jsonl."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest validation means."""
    position: Any = field(default=None, metadata={"local": True})
    """This process's position in its data after the last update; None before the first."""

    _started = 0.0

    def count(self, samples: int, weight: float, skipped: bool, overflowed: bool) -> None:
        """Count one update of `samples` samples and `weight`; nothing else does."""
        self.update += 1
        self.samples += samples
        self.weight += weight
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflowed else 0

    def start_clock(self) -> None:
        """Start to measure `elapsed`."""
        self._started = time.perf_counter() - self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds of running up to now, earlier starts included."""
        return time.perf_counter() - self._started

    def stop_clock(self) -> None:
        """Write the seconds so far into `seconds`."""
        self.seconds = self.elapsed

    def state_dict(self) -> dict[str, Any]:
        """Return the fields that are the same on all processes."""
        return {name: getattr(self, name) for name in shared_fields()}

    @classmethod
    def of(cls, saved: Mapping[str, Any], position: Any) -> Self:
        """Return the state that `state_dict` described, with this process's position."""
        return cls(**{name: saved[name] for name in shared_fields()}, position=position)


def shared_fields() -> list[str]:
    """Return the names of the fields that are the same on all processes."""
    return [field.name for field in fields(RunState) if not field.metadata.get("local")]


@dataclass
class Control:
    """Requests made of a run while it runs; no checkpoint holds them."""

    stop_requested: bool = False  # `Trainer.stop` was called
    stop_is_collective: bool = False  # on all processes alike
    interrupted_by: str = ""  # the signal that ended the run before its end
