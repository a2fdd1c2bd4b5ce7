"""Messages between hosts: values of all in order, in messages that grow as log2 of the processes, and by one key."""

from __future__ import annotations

import math
import os
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import Callback, Trainer
from strategies import DDPStrategy, FSDPStrategy, UserError
from strategies import process_group as module
from strategies.process_group import ProcessGroupStrategy, _check_open_files
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, big_batch_run, in_order

SIZES = [1, 2, 3, 5]


def set_up() -> ProcessGroupStrategy:
    strategy = DDPStrategy(device="cpu")
    strategy.setup()
    return strategy


def counted(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Return what `call` returns, and the messages that this process sends and receives in it."""
    sent: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            sent[name] += 1
            return original(*args, **kwargs)

        return wrapper

    names = ("send_object_list", "recv_object_list", "isend", "send", "recv", "broadcast_object_list", "all_gather")
    originals = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, counting(name))
    try:
        return call(), sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@pytest.mark.parametrize("P", SIZES)
def test_rows_are_those_of_all_in_order(P: int) -> None:
    expected = [(rank, "x" * rank) for rank in range(P)]

    @on_processes(P)
    def results() -> Any:
        strategy = set_up()
        own = (strategy.rank, "x" * strategy.rank)
        found, sent = counted(lambda: strategy.gather(own))
        collected = strategy.collect(own)
        return found, collected, strategy.first(own), sent, strategy.gather([None] * strategy.rank)

    for rank, (found, collected, first, sent, lists) in enumerate(results):
        assert found == expected
        assert first == expected[0]
        assert lists == [[None] * rank for rank in range(P)]
        if rank == 0:
            assert collected == expected
        assert sent["send_object_list"] == (rank > 0)
        assert sent["recv_object_list"] <= math.ceil(math.log2(P))


def compared(odd: int) -> Any:
    strategy = set_up()
    value = {"N": 5 if strategy.rank == odd else 4, "norm": math.nan}
    return counted(lambda: strategy.compare(value))


@pytest.mark.parametrize("P", SIZES)
def test_values_are_gathered_where_they_differ(P: int) -> None:
    for found, sent in run(P, compared, -1):
        assert [row["N"] for row in found] == [4]
        assert sent.keys() <= {"isend", "send", "recv"}
        assert sent["isend"] + sent["send"] <= math.floor(math.log2(P)) + 1
    for odd in {0, P - 1} if P > 1 else ():
        for found, _ in run(P, compared, odd):
            assert [row["N"] for row in found] == [5 if rank == odd else 4 for rank in range(P)]


class Counting:
    """A store that counts its requests."""

    def __init__(self) -> None:
        self.store, self.requests = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_the_first_failure_is_one_key() -> None:
    from strategies.status_board import StatusBoard

    store = Counting()
    boards = [StatusBoard(store, rank, 100) for rank in range(100)]
    assert boards[3].reported() == ""
    boards[7].report("KeyError: 'a b'")
    boards[2].report("ValueError: later")
    store.requests = 0
    assert boards[99].reported() == "process 7 failed: KeyError: 'a b'"
    assert store.requests == 2
    for board in boards:
        board.post("activity", f"at {board._rank}")
    store.requests = 0
    assert boards[0].posted("activity") == {rank: f"at {rank}" for rank in range(100)}
    assert store.requests == 2


def test_a_limit_of_open_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    for processes, rank, lazily in ((64, 0, False), (10_000, 1, True), (400, 1, False), (800, 0, True)):
        _check_open_files(processes, rank, lazily)
    with pytest.raises(UserError, match=r"10000 processes: expected at least .* process 0, seen a limit of 1024"):
        _check_open_files(10_000, 0, lazily=True)
    with pytest.raises(UserError, match="Use ulimit -n 1126 before the start"):
        _check_open_files(500, 1, lazily=False)


def sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))


def connected(largest_mesh: int) -> int:
    module.LARGEST_MESH = largest_mesh  # in this process alone
    before = sockets()
    strategy = set_up()
    assert strategy.gather(strategy.rank) == [*range(strategy.processes)]
    assert strategy.exchange([1.0, strategy.rank, 0.0, 0.0])() == [[9.0, 8.0, 0.0, 0.0]]
    found = sockets() - before
    strategy.barrier()
    strategy.teardown()
    return found


def test_many_processes_connect_to_few() -> None:
    P = 9
    assert min(run(P, connected, 64)) >= P - 1  # of the group for messages: the other is the test's
    assert max(run(P, connected, 4)) < P - 1


def dies(largest_mesh: int) -> None:
    module.LARGEST_MESH = largest_mesh
    strategy = set_up()
    if strategy.rank == 1:
        os._exit(1)
    strategy.gather(strategy.rank)


def test_a_process_that_dies_ends_the_wait_of_all_that_connected_lazily() -> None:
    with pytest.raises(ChildError) as raised:
        run(5, dies, 2, seconds=25)
    assert {*raised.value.errors} == {*range(5)}
    assert "timed out" not in raised.value.errors.values()


def trains(strategy: str, dies_at: int) -> torch.Tensor:
    module.LARGEST_MESH = 1

    class Dies(Callback):
        def on_fit_end(self, trainer: Any) -> None:
            self.model = trainer.strategy.state_dict()["model"]  # of FSDP, whole on process 0

        def on_update_end(self, trainer: Any) -> None:
            if trainer.update == dies_at and trainer.strategy.rank == 1:
                os._exit(1)

    chosen = (FSDPStrategy if strategy == "fsdp" else DDPStrategy)(device="cpu")
    dies = Dies()
    Trainer(chosen, micro_batch_size=2, max_epochs=2, shuffle=False, callbacks=dies).fit(Regression(21))
    return torch.cat([value.flatten() for value in dies.model.values()]) if dies.model else torch.empty(0)


@pytest.mark.parametrize(("strategy", "P"), [("ddp", 2), ("ddp", 4), ("fsdp", 3)])
def test_processes_that_connect_lazily_train_what_one_big_batch_trains(strategy: str, P: int) -> None:
    expected = big_batch_run(Regression(21), [in_order(21, 2 * P)] * 2)
    for found in run(P, trains, strategy, 0)[: 1 if strategy == "fsdp" else P]:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_run_that_connected_lazily_ends_with_the_process_that_dies() -> None:
    with pytest.raises(ChildError) as raised:
        run(4, trains, "ddp", 3, seconds=40)
    assert raised.value.errors[1] == "died with exit code 1"
    for rank in (0, 2, 3):
        assert "ProcessFailureError: lost contact with another process" in raised.value.errors[rank]
