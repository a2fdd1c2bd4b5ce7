"""ZeRO-1: the optimizer divided among the processes is the optimizer that is not, and a P-th of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Accumulator, Trainer
from strategies import DDPStrategy
from strategies.optimizer_shards import divide
from tests.kit.killed import Dies, Full, fit, history, same
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, parameters

N = 4
SLOW = pytest.mark.slow


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).double()


def sgd(groups: Any) -> Any:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def adamw(groups: Any) -> Any:
    return torch.optim.AdamW(groups, lr=0.01)


def adagrad(groups: Any) -> Any:
    """Makes its state at once."""
    return torch.optim.Adagrad(groups, lr=0.01)


class Grouped(Regression):
    """Two groups, a frozen layer in one of them, and a learning rate that moves."""

    def __init__(self, samples: int, make: Any) -> None:
        super().__init__(samples, model=wide)
        self.make = make

    def configure_model(self) -> nn.Module:
        model = super().configure_model()
        model[0].bias.requires_grad_(False)
        return model

    def configure_optimizer(self, model: nn.Module) -> Any:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        optimizer = self.make([{"params": matrices}, {"params": rest, "lr": 0.05, "weight_decay": 0.1}])
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def state_bytes(optimizer: Any) -> int:
    states = [state for parameter, state in optimizer.state.items() if parameter.requires_grad]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim)


def train(make: Any, samples: int, K: int, shards: bool) -> Any:
    strategy = DDPStrategy(shard_optimizer=shards, bucket_cap_mb=0.01)
    trainer = Trainer(strategy, N, K, max_epochs=3, shuffle=False, gradient_clip_norm=0.5)
    kept: list[Any] = []
    trainer.callbacks.append(keep := Count())
    keep.on_fit_end = lambda trainer: kept.append(strategy.state_dict(trainer.optimizer))  # type: ignore[method-assign]
    trainer.fit(Grouped(samples, make))
    return parameters(trainer.model), kept[0], state_bytes(trainer.optimizer)


@pytest.mark.parametrize(
    ("P", "make"),
    [(2, sgd), (3, adamw), (2, adagrad), *(pytest.param(P, make, marks=SLOW) for P in (1, 4) for make in (sgd, adamw))],
)
def test_parameters_and_checkpoint_are_those_of_ddp_to_the_bit(P: int, make: Any) -> None:
    samples = 2 * P * N * 2 + N + 1  # in the last window of an epoch processes have different numbers of micro-batches
    whole, divided = (run(P, train, make, samples, 2, shards) for shards in (False, True))
    for (found, *_), (expected, *_) in zip(divided, whole, strict=True):
        assert torch.equal(found, expected)
    assert same(divided[0][1], whole[0][1])
    sizes, size = [own for *_, own in divided], whole[0][2]
    largest = 40 * 40 * 8 * (2 if make is adamw else 1)
    assert sum(sizes) == size
    assert max(sizes) <= max(size / P * 1.1, largest)


def divided_bytes(P: int) -> list[int]:
    layers = [nn.Linear(24, 24) for _ in range(12)]
    return [sum(p.numel() for p in share) for share in divide([p for m in layers for p in m.parameters()], P)]


@pytest.mark.parametrize("P", [1, 2, 3, 4, 7])
def test_shares_are_about_equal(P: int) -> None:
    sizes = divided_bytes(P)
    assert sum(sizes) == 12 * 24 * 25
    assert max(sizes) - min(sizes) <= 24 * 24


@pytest.mark.parametrize("P", [2, 3])
def test_an_update_adds_one_broadcast_from_each_process(P: int) -> None:
    @on_processes(P)
    def by_rank() -> Any:
        watch = Count()
        strategy = DDPStrategy(shard_optimizer=True)
        Trainer(strategy, N, 3, max_epochs=2, callbacks=watch).fit(Regression(3 * N * P * 2))
        return watch.counts

    for counts in by_rank:
        assert all(update == {"allreduce_": 1, "allgather_": 1, "broadcast_": P} for update in counts), counts


class DiesSharded(Dies):
    def __init__(self, kill: Any) -> None:
        super().__init__(kill)
        self.shard_optimizer = True


def fit_sharded(folder: str, kill: Any, stops_at: int | None = None) -> Any:
    return fit(folder, stops_at=stops_at, strategy=DiesSharded(kill))


@pytest.mark.parametrize("moment", [pytest.param("before step", marks=SLOW), "in save"])
def test_killed_and_continued_is_uninterrupted_to_the_bit(moment: str, tmp_path: Path) -> None:
    whole = run(3, fit_sharded, str(tmp_path / "whole" / "run"), None)
    folder = tmp_path / "parts" / "run"
    with pytest.raises(ChildError):
        run(3, fit_sharded, str(folder), (1, 3, moment))
    assert same(run(3, fit_sharded, str(folder), None), whole)
    assert history(folder) == history(tmp_path / "whole" / "run")


def fit_with(folder: str, stops_at: int | None, kind: str) -> Any:
    task = Full(normalises=False, adaptive=False)
    strategy = "single" if kind == "single" else DDPStrategy(shard_optimizer=kind == "sharded")
    return fit(folder, stops_at=stops_at, task=task, strategy=strategy)


@pytest.mark.parametrize(
    "starts",
    [
        [(4, "sharded"), (2, "sharded"), (3, "sharded")],
        pytest.param([(2, "sharded"), (2, "ddp"), (3, "sharded")], marks=SLOW),
        [(1, "single"), (3, "sharded"), (1, "single")],
    ],
    ids=str,
)
def test_a_run_goes_on_on_any_number_of_processes_and_without_shards(starts: Any, tmp_path: Path) -> None:
    first, kind = starts[0]
    whole = run(first, fit_with, str(tmp_path / "whole" / "run"), None, kind, group=kind != "single")[0]
    for (P, kind), stops_at in zip(starts, (2, 5, None), strict=True):
        parts = run(P, fit_with, str(tmp_path / "parts" / "run"), stops_at, kind, group=kind != "single")[0]
    for name, value in whole[2][0]["model"].items():
        torch.testing.assert_close(parts[2][0]["model"][name], value, rtol=0, atol=1e-12)
    for name, state in whole[2][0]["optimizer"]["state"].items():
        torch.testing.assert_close(parts[2][0]["optimizer"]["state"][name], state, rtol=0, atol=1e-12)


def train_own(shards: bool) -> Any:
    task, strategy = Regression(29), DDPStrategy(shard_optimizer=shards)
    strategy.setup()
    torch.manual_seed(0)
    model = strategy.prepare(task.configure_model())
    optimizer = adamw(model.parameters())
    accumulator = Accumulator(strategy, model, optimizer, task.train_data(), N, 2)
    for epoch in range(2):
        for window in accumulator.windows(epoch):
            for batch in window:
                window.backward(task.loss(model, batch))
            window.update()
    strategy.teardown()
    return parameters(model), len(optimizer.state)


def test_a_loop_of_one_s_own() -> None:
    divided, whole = run(3, train_own, True), run(3, train_own, False)
    assert sum(states for _, states in divided) == 6
    for (found, _), (expected, states) in zip(divided, whole, strict=True):
        assert states == 6
        assert torch.equal(found, expected)


def train_both(options: dict[str, Any]) -> Tensor:
    task = Regression(29, model=wide)
    task.configure_optimizer = lambda model: adamw(model.parameters())  # type: ignore[method-assign]
    trainer = Trainer(DDPStrategy(bucket_cap_mb=1e-4, **options), N, 2, max_epochs=3)
    trainer.fit(task)
    return parameters(trainer.model)


def test_shards_with_a_hook_and_with_gradients_in_the_buckets() -> None:
    for options in ({"communication_hook": "fp16"}, {"gradient_as_bucket_view": True}):
        whole, divided = (run(3, train_both, {**options, "shard_optimizer": shards}) for shards in (False, True))
        assert all(map(torch.equal, divided, whole))


def pointwise() -> nn.Module:
    layers = [nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def fit_pointwise(shards: bool) -> Tensor:
    trainer = Trainer(DDPStrategy(shard_optimizer=shards), N, 2, max_epochs=1)
    trainer.fit(Regression(29, model=pointwise))
    return parameters(trainer.model)


def test_a_share_of_one_convolution_in_channels_last() -> None:
    whole, divided = (run(2, fit_pointwise, shards) for shards in (False, True))
    assert all(map(torch.equal, divided, whole))
