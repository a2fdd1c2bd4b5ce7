"""A loop of your own, saved and resumed from its own checkpoint, at any update and on any P."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Accumulator, Loss
from strategies.registry import find
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, big_batch_run, in_order

SAMPLES, EPOCHS = 23, 3


class Stream:
    """Every P-th micro-batch."""

    def __init__(self, task: Regression, rank: int, P: int, keeps_state: bool) -> None:
        self.batches = list(zip(*(t.split(2) for t in task.train_data().tensors), strict=True))[rank::P]
        self.next = 0
        if keeps_state:
            self.state_dict = lambda: {"next": self.next}
            self.load_state_dict = lambda state: setattr(self, "next", state["next"])

    def __iter__(self) -> Any:
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0


class Weighted(nn.Module):
    """Draws, and has buffers that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1)).double()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        self.seen += x.abs().sum().detach()
        return self.layers(x)


def loop(
    strategy: Any, path: Path, kind: str, save_at: int | None, model: Any = Weighted, lr: str = "steps", **options: Any
) -> Any:
    """Trains to the end of a run, from the checkpoint at `path` if there is one; or saves at an update, and ends."""
    strategy = find(strategy)()
    strategy.setup()
    task = Regression(SAMPLES)
    torch.manual_seed(0)
    net = strategy.prepare(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9 if lr else 0.0)
    P, rank = strategy.data_parallel_size, strategy.data_parallel_rank
    data = task.train_data() if kind == "map" else Stream(task, rank, P, kind == "state")
    options = {"max_epochs": EPOCHS, "shuffle": kind == "map" and bool(lr), **options}
    accumulator = Accumulator(strategy, net, optimizer, data, **{"micro_batch_size": 2, **options})
    if lr:
        total = accumulator.total_updates or 60
        accumulator.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total + 1)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        strategy.load_state_dict(saved, optimizer)
        accumulator.load_state_dict(saved["accumulator"])
        if accumulator.lr_scheduler is not None:
            accumulator.lr_scheduler.load_state_dict(saved["lr"])
    sizes = []
    for epoch in range(accumulator.epoch, EPOCHS):
        for window in accumulator.windows(epoch):
            for x, y, index in window:
                losses = (net(x) - y).square()[:, 0]
                weights = 1 + index % 3 if lr else torch.ones_like(index)
                window.backward(Loss((losses * weights).sum(), weights.sum()))
            sizes.append(window.update().samples)
            if accumulator.update == save_at:
                state = {**strategy.state_dict(optimizer), "accumulator": accumulator.state_dict()}
                if accumulator.lr_scheduler is not None:
                    state["lr"] = accumulator.lr_scheduler.state_dict()
                if strategy.rank == 0:
                    torch.save(state, path)
                strategy.barrier()
                strategy.teardown()
                return sizes
    assert accumulator.total_updates in (None, accumulator.update)
    whole = strategy.state_dict()["model"]
    strategy.teardown()
    return sizes, accumulator.samples, torch.cat([t.flatten() for t in whole.values()]) if rank == 0 else None


CASES = [
    ("single", 1, "map", {0: 3, 1: 1}),
    ("ddp", 2, "map", {0: 3, 1: 1}),
    ("ddp", 3, "map", {0: 2}),
    ("fsdp", 2, "map", {0: 2}),
    ("single", 1, "state", {0: 3, 1: 1}),
    ("ddp", 2, "state", {0: 3, 1: 1}),
    ("ddp", 2, "read again", {0: 2}),
]


@pytest.mark.parametrize(("strategy", "P", "kind", "K"), CASES)
def test_a_resumed_loop_is_the_loop_to_the_bit(strategy: str, P: int, kind: str, K: Any, tmp_path: Path) -> None:
    def in_parts(save_at: list[int | None]) -> list[Any]:
        return [loop(strategy, tmp_path / f"{len(save_at)}.pt", kind, at, accumulate_grad_batches=K) for at in save_at]

    (whole,) = run(P, in_parts, [None])[0]
    ends = [n for n in range(1, len(whole[0]) + 1) if sum(whole[0][:n]) % SAMPLES == 0]
    for cuts in (sorted({1, ends[0], ends[0] + 1}), sorted({ends[0] + 1, ends[1] - 1})):
        *parts, last = run(P, in_parts, [*cuts, None])[0]
        assert sum(parts, []) + last[0] == whole[0]
        assert last[1] == whole[1] == SAMPLES * EPOCHS
        assert torch.equal(last[2], whole[2])


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"effective_batch_size": 12}])
@pytest.mark.parametrize("resumed", [{"accumulate_grad_batches": 6}, {"effective_batch_size": 12}, {}])
def test_another_P_goes_on_with_the_same_effective_batch(options: Any, resumed: Any, tmp_path: Path) -> None:
    resumed = resumed or options
    path = tmp_path / "own.pt"
    run_with(2, path, 3, options)
    ((sizes, _, found),) = run_with(1, path, None, resumed)
    assert sizes == [11, 12, 11]
    reference = big_batch_run(Regression(SAMPLES), [in_order(SAMPLES, 12)] * EPOCHS)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


def run_with(P: int, path: Path, save_at: int | None, options: dict[str, Any]) -> list[Any]:
    return run(P, lambda: loop("ddp", path, "map", save_at, Regression(SAMPLES).model, "", **options))


@pytest.mark.parametrize(("unit", "K"), [("update", {0: 3, 2: 1}), ("sample", {0: 3, 8: 2})])
def test_a_schedule_may_count_updates_or_samples(unit: str, K: dict[int, int], tmp_path: Path) -> None:
    sizes = loop("single", tmp_path / "none", "map", None, accumulate_grad_batches=K, unit=unit)[0]
    first = [6, 6, 2, 2, 2, 2, 2, 1] if unit == "update" else [6, 6, 4, 4, 3]
    assert sizes[: len(first)] == first


@pytest.mark.parametrize("kind", ["map", "state"])
def test_max_updates_ends_the_windows(kind: str, tmp_path: Path) -> None:
    options = {"max_updates": 7, "accumulate_grad_batches": 2}
    assert len(loop("single", tmp_path / "none", kind, None, **options)[0]) == 7
    assert len(loop("single", tmp_path / "own.pt", kind, 4, **options)) == 4
    assert len(loop("single", tmp_path / "own.pt", kind, None, **options)[0]) == 3


OTHERS = {
    "K": ({"accumulate_grad_batches": 4}, r"an update was 6 samples \(accumulate_grad_batches=3\) and is 8 samples"),
    "B": ({"effective_batch_size": 4}, r"and is 4 samples \(effective_batch_size=4\)"),
    "N": ({"micro_batch_size": 3, "accumulate_grad_batches": 2}, "micro_batch_size was 2 and is 3"),
    "seed": ({"seed": 1, "accumulate_grad_batches": 3}, "seed was 0 and is 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused(case: str, tmp_path: Path) -> None:
    options, message = OTHERS[case]
    loop("single", tmp_path / "own.pt", "map", 2, accumulate_grad_batches=3)
    with pytest.raises(ValueError, match=message) as raised:
        loop("single", tmp_path / "own.pt", "map", None, **options)
    assert "=1 " not in str(raised.value)
    assert "None" not in str(raised.value)


def test_another_epoch_than_the_one_loaded_is_refused() -> None:
    strategy = find("single")()
    model = strategy.prepare(nn.Linear(5, 1).double())
    task = Regression(8)

    def fresh() -> Accumulator:
        return Accumulator(strategy, model, torch.optim.SGD(model.parameters()), task.train_data(), 2)

    def trained(accumulator: Accumulator, epoch: int, updates: int) -> Any:
        for window in accumulator.windows(epoch):
            for x, y, _ in window:
                window.backward((model(x) - y).square().mean())
            window.update()
            if accumulator.update == updates:
                return accumulator.state_dict()
        raise AssertionError

    within, ended = trained(fresh(), 1, 2), trained(fresh(), 1, 4)
    again = fresh()
    again.load_state_dict(within)
    assert again.state_dict() == within  # the position too: otherwise samples would be trained on twice
    for state, epoch in ((within, 0), (within, 2), (ended, 0)):
        accumulator = fresh()
        accumulator.load_state_dict(state)
        with pytest.raises(ValueError, match=rf"epoch={epoch}: expected the one that was loaded. Begin with epoch 1"):
            next(accumulator.windows(epoch))
    accumulator = fresh()
    accumulator.load_state_dict(ended)
    assert not list(accumulator.windows(1))
    assert trained(accumulator, 2, 5)


def test_a_stream_within_an_epoch_needs_as_many_processes(tmp_path: Path) -> None:
    def part(save_at: int | None) -> Any:
        return loop("ddp", tmp_path / "own.pt", "state", save_at, accumulate_grad_batches=2)

    run(2, part, 1)
    with pytest.raises(ChildError, match="where 2 processes read streams of their own, and now there are 3"):
        run(3, part, None)


@pytest.mark.parametrize("name", ["effective_batch_size", "max_epochs", "max_updates"])
def test_a_count_must_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: expected a whole number of at least 1"):
        loop("single", tmp_path / "none", "map", None, **{name: 0})


def test_one_window_length_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 and effective_batch_size=4 both set the window"):
        loop("single", tmp_path / "none", "map", None, accumulate_grad_batches=2, effective_batch_size=4)
