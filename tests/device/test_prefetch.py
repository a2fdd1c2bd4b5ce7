"""`prefetch_to_device=True`: the same updates; each batch begins to move one ahead, and is waited for on the device."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from engine import Trainer
from engine.data.prefetch import Prefetch
from strategies import SingleDeviceStrategy
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, Samples, big_batch_run, in_order, parameters
from tests.kit.streams import Streamed, deal, windows_of

N, K = 2, 3
STREAMS = deal([5, 4], [3, 1, 2])


class Logged(Regression):
    """Tells of each loss; its samples come one by one, and one of them may be broken."""

    def __init__(self, samples: int, events: list[str], broken: int = -1) -> None:
        super().__init__(samples)
        self.events, self.broken, self.number = events, broken, 0

    def train_data(self) -> Any:
        return _Breaks(self.x, self.y, self.broken)

    def loss(self, model: Any, batch: Any) -> Any:
        self.events.append(f"compute {self.number}")
        self.number += 1
        return super().loss(model, batch)


class _Breaks(Samples):
    def __init__(self, x: Any, y: Any, broken: int) -> None:
        super().__init__(x, y)
        self.broken = broken

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise RuntimeError("a broken sample")
        return super().__getitem__(index)


class LoggedStream(Logged):
    def train_data(self) -> Any:
        samples = _Breaks(self.x, self.y, self.broken)
        return (_batch(samples, start) for start in range(0, len(samples), N))


def _batch(samples: Samples, start: int) -> Any:
    return torch.utils.data.default_collate([samples[i] for i in range(start, min(start + N, len(samples)))])


class LoggedMoves(SingleDeviceStrategy):
    def __init__(self, events: list[str]) -> None:
        super().__init__("cpu")
        self._events, self._number = events, 0

    def to_device(self, batch: Any) -> Any:
        self._events.append(f"move {self._number}")
        self._number += 1
        return super().to_device(batch)


def fit(strategy: Any, task: Any, **settings: Any) -> Any:
    settings = {"max_epochs": 2, "shuffle": False, "prefetch_to_device": True, **settings}
    trainer = Trainer(strategy, micro_batch_size=N, accumulate_grad_batches=K, **settings)
    trainer.fit(task)
    return parameters(trainer.model), task.seen


@pytest.mark.parametrize(("P", "strategy"), [(1, "single"), (2, "ddp")])
@pytest.mark.parametrize("samples", [24, 23, 25])
def test_datasets_train_what_one_big_batch_trains(P: int, strategy: str, samples: int) -> None:
    expected = big_batch_run(Regression(samples), [in_order(samples, P * N * K)] * 2)

    @on_processes(P)
    def results() -> Any:
        return [fit(strategy, Regression(samples), prefetch_to_device=ahead) for ahead in (True, False)]

    for (found, seen), (plain, plainly_seen) in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert torch.equal(found, plain)
        assert seen == plainly_seen


@pytest.mark.parametrize("P", [1, 2])
def test_uneven_streams_train_what_one_big_batch_trains(P: int) -> None:
    task = Streamed(20, STREAMS[:P])
    expected = big_batch_run(task, [windows_of(STREAMS[:P], K)] * 2)
    for found, _ in run(P, fit, "single" if P == 1 else "ddp", task):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", [Logged, LoggedStream])
def test_each_batch_begins_to_move_before_the_one_before_is_computed_with(task: Any) -> None:
    events: list[str] = []
    fit(LoggedMoves(events), task(8 * N, events), max_epochs=1)
    ahead = [event for i in range(7) for event in (f"move {i + 1}", f"compute {i}")]
    assert events == ["move 0", *ahead, "compute 7"]


@pytest.mark.parametrize("task", [Logged, LoggedStream])
def test_an_error_met_ahead_comes_at_its_turn(task: Any) -> None:
    events: list[str] = []
    trainer = Trainer("single", N, accumulate_grad_batches=1, max_epochs=1, shuffle=False, prefetch_to_device=True)
    with pytest.raises(RuntimeError, match="a broken sample"):
        trainer.fit(task(8 * N, events, broken=2 * N))
    assert trainer.update == 2
    assert events == ["compute 0", "compute 1"]


class Stream:
    """A stream that keeps what it is told, in place of torch's for the CPU, which keep nothing."""

    events: list[str]
    current: Stream

    def __init__(self, device: Any, name: str = "the copies'") -> None:
        assert device == torch.device("cpu")
        self.name, self.recorded = name, 0

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        event = f"arrival {self.recorded}"
        self.recorded += 1
        self.events.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")


class Entered:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self.stream
        Stream.events.append(f"on {self.stream.name}:")

    def __exit__(self, *raised: Any) -> None:
        Stream.current = self.before


def test_what_waits_for_what_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Stream.events = []
    Stream.current = Stream(torch.device("cpu"), "the model's")
    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "stream", Entered)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device: Stream.current)
    fit(LoggedMoves(events), Logged(2 * N, events), max_epochs=1)
    begins = ["the copies' waits for the model's", "on the copies':"]
    assert events == [
        *(*begins, "move 0", "the copies' records arrival 0"),
        *(*begins, "move 1", "the copies' records arrival 1"),
        *("the model's waits for arrival 0", "compute 0"),
        *("the model's waits for arrival 1", "compute 1"),
    ]


def test_a_batch_is_kept_until_it_has_been_read_and_no_longer() -> None:
    prefetch = Prefetch(SingleDeviceStrategy("cpu"), Regression(1))
    batch = prefetch.to_device(prefetch.start(torch.zeros(1)))
    lives = weakref.ref(batch)
    del batch
    assert lives() is not None  # its reader may just have been launched
    prefetch.start(torch.zeros(1))
    assert lives() is None
