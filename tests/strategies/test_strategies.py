"""Strategies on their own: what they declare, refuse, reduce, clip and keep."""

from __future__ import annotations

from contextlib import nullcontext
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine import GradientAccumulationScheduler, Trainer
from strategies import DDPStrategy, DPStrategy, FSDPStrategy, PipelineStrategy, SingleDeviceStrategy, Strategy, resolve
from strategies.dp import SplitOverCPU
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Branches, Regression, data, mlp, parameters


class Fixed(Strategy):
    """The least that a strategy must give."""

    supports_variable_windows = False

    def effective_batch(self, N: int, K: int) -> int:
        return N * K

    def accumulation_context(self, is_last_microbatch: bool) -> Any:
        return nullcontext()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def test_effective_batches() -> None:
    assert SingleDeviceStrategy().effective_batch(4, 3) == 12
    assert DPStrategy(2, "cpu").effective_batch(4, 3) == 12
    assert run(3, lambda: DDPStrategy().effective_batch(4, 3)) == [36] * 3


def test_three_methods_make_a_strategy() -> None:
    found = []
    for strategy in (Fixed(), SingleDeviceStrategy()):
        trainer = Trainer(strategy, micro_batch_size=4, accumulate_grad_batches=3, max_epochs=2)
        trainer.fit(Regression(31))
        found.append(parameters(trainer.model))
    assert torch.equal(*found)


def test_a_strategy_without_variable_windows_refuses_a_schedule_at_once() -> None:
    with pytest.raises(ValueError, match=r"'custom' does not support variable windows.*\{0: 8, 4: 4\}.*Use accum"):
        Trainer(Fixed(), max_epochs=8, callbacks=GradientAccumulationScheduler({0: 8, 4: 4}))
    Trainer(Fixed(), max_epochs=8, callbacks=GradientAccumulationScheduler({0: 8, 4: 8}))


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(resolve("auto")) is SingleDeviceStrategy
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert type(resolve("auto")) is DDPStrategy


@pytest.mark.parametrize("name", ["dpp", "lightning", "nope.Nope", 3])
def test_an_unknown_name_is_told_the_known_ones(name: Any) -> None:
    with pytest.raises(ValueError, match="expected one of auto, single, dp, ddp"):
        resolve(name)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DPStrategy])
def test_one_process_strategies_refuse_several(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 were started"):
        Trainer(strategy(), max_epochs=1).fit(Regression(40))


@pytest.mark.parametrize("option", ["static_graph", "delay_all_reduce_named_params", "mixed_precision"])
def test_ddp_refuses_what_is_known_to_be_wrong(option: str) -> None:
    with pytest.raises(ValueError, match=f"does not take {option}: "):
        DDPStrategy(**{option: True})
    with pytest.raises(TypeError, match="no option 'statik'"):
        DDPStrategy(statik=True)


class Static(DDPStrategy):
    def wrap(self, model: nn.Module) -> Any:
        return nn.parallel.DistributedDataParallel(model, static_graph=True)


def test_a_subclass_cannot_bring_in_a_static_graph() -> None:
    with pytest.raises(ChildError, match="does not take static_graph"):
        run(2, lambda: Trainer(Static(), micro_batch_size=4, max_epochs=1).fit(Regression(40)))


def test_dp_on_the_cpu_really_splits_the_batch() -> None:
    sizes: list[int] = []

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor, *, scale: float) -> dict[str, Any]:
            sizes.append(len(x))
            return {"out": self.inner(x) * scale, "pair": (x, x.sum())}

    model, (x, _) = Sees(), data(7)
    found = SplitOverCPU(model, 3)(x, scale=2.0)
    assert sizes == [3, 3, 1]
    whole = model(x, scale=2.0)
    torch.testing.assert_close(found["out"], whole["out"], rtol=0, atol=1e-15)
    assert found["pair"][1].shape == (3,)
    found["out"].sum().backward()
    split = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    whole["out"].sum().backward()
    for part, p in zip(split, model.parameters(), strict=True):
        torch.testing.assert_close(part, p.grad, rtol=0, atol=1e-14)


def test_dp_keeps_the_buffers_of_its_first_device() -> None:
    norm = nn.BatchNorm1d(5).double()
    x, _ = data(8)
    SplitOverCPU(norm, 2)(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x[:4].mean(0))


def test_dp_refuses_tensors_that_cannot_be_split_together() -> None:
    with pytest.raises(ValueError, match=r"expected equal sizes, got \[1, 8\]"):
        SplitOverCPU(nn.Bilinear(5, 5, 1).double(), 2)(data(8)[0], data(1)[0])


@pytest.mark.parametrize("devices", [0, -1, True, 1.5])
def test_dp_wants_a_number_of_devices(devices: Any) -> None:
    with pytest.raises(ValueError, match="devices="):
        DPStrategy(devices, "cpu")


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
def test_clip_is_that_of_torch_after_the_factor(max_norm: float | None, factor: float) -> None:
    strategy, model = SingleDeviceStrategy("cpu"), mlp()
    strategy.prepare(model)
    model(data(9)[0]).sum().backward()
    expected = [p.grad * factor for p in model.parameters()]  # type: ignore[operator]
    copies = [nn.Parameter(g.clone()) for g in expected]
    for copy, gradient in zip(copies, expected, strict=True):
        copy.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(copies, max_norm or float("inf"))
    torch.testing.assert_close(strategy.clip(max_norm, factor), norm, rtol=1e-14, atol=0)
    for p, copy in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(p.grad, copy.grad, rtol=1e-14, atol=0)


class Compiled(Regression):
    def configure_model(self) -> nn.Module:
        return torch.compile(super().configure_model(), backend="eager")  # type: ignore[return-value]


def keep_and_load(task: Any) -> Any:
    strategy = DDPStrategy()
    trainer = Trainer(strategy, micro_batch_size=4, max_epochs=1)
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters())
    states: list[Any] = []

    def keep(trainer: Any) -> None:
        states.append(trainer.strategy.state_dict(trainer.optimizer))
        for p in trainer.model.parameters():
            p.data.zero_()
        trainer.strategy.load_state_dict(states[0], trainer.optimizer)
        states.append(trainer.strategy.state_dict(trainer.optimizer))

    from engine import Callback

    callback = Callback()
    callback.on_fit_end = keep  # type: ignore[method-assign]
    trainer.callbacks.append(callback)
    trainer.fit(task)
    names = [name.removeprefix("_orig_mod.") for name, _ in trainer.model.named_parameters()]
    return names, states


@pytest.mark.parametrize("task_class", [Regression, Compiled])
def test_state_has_the_user_s_names_and_can_be_loaded(task_class: Any) -> None:
    for names, (first, second) in run(2, keep_and_load, task_class(16)):
        assert list(first["model"]) == names
        for name in names:
            assert torch.equal(first["model"][name], second["model"][name])
            assert first["model"][name].abs().sum() > 0
            assert torch.equal(
                first["optimizer"]["state"][name]["exp_avg"], second["optimizer"]["state"][name]["exp_avg"]
            )


def test_a_group_that_exists_is_used_and_left_in_place() -> None:
    @on_processes(2)
    def is_initialized() -> bool:
        for _ in range(2):
            Trainer("ddp", micro_batch_size=4, max_epochs=1).fit(Regression(16))
        return dist.is_initialized()

    assert is_initialized == [True, True]


def test_a_group_that_tally_made_is_destroyed() -> None:
    @on_processes(1, group=False)
    def is_initialized() -> bool:
        for _ in range(2):
            Trainer("ddp", micro_batch_size=4, max_epochs=1).fit(Regression(16))
        return dist.is_initialized()

    assert is_initialized == [False]


def second_window_then_as_first(samples: int) -> bool:
    """Does a process that starts at the second window get the bits of one that had a first?"""

    def big() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 1)).double()

    x, y = data(samples)
    rank, P = dist.get_rank(), dist.get_world_size()

    def gradient(strategy: DDPStrategy, model: nn.Module, seed: int) -> torch.Tensor:
        rows = slice(rank + seed, None, P)
        with strategy.accumulation_context(True):
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]

    torch.manual_seed(0)
    once, again = DDPStrategy(bucket_cap_mb=0.01), DDPStrategy(bucket_cap_mb=0.01)
    first = once.prepare(big())
    gradient(once, first, 0)
    first.zero_grad()
    second = again.prepare(big())
    second.load_state_dict(first.state_dict())
    return torch.equal(gradient(once, first, 1), gradient(again, second, 1))


@pytest.mark.parametrize("P", [3, 4])
def test_a_rerun_sums_in_the_same_order_to_the_bit(P: int) -> None:
    assert run(P, second_window_then_as_first, 64) == [True] * P


def fit_branches(find_unused: bool, K: int) -> Any:
    strategy = DDPStrategy(find_unused_parameters=find_unused)
    trainer = Trainer(strategy, micro_batch_size=2, accumulate_grad_batches=K, max_epochs=3, shuffle=False)
    task = Regression(23, model=Branches)
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    trainer.fit(task)
    return parameters(trainer.model)


@pytest.mark.parametrize(("P", "K"), [(1, 4), (2, 2), (4, 1)])
def test_parameters_used_only_in_some_micro_batches(P: int, K: int) -> None:
    alone = Trainer("single", micro_batch_size=2, accumulate_grad_batches=4, max_epochs=3, shuffle=False)
    task = Regression(23, model=Branches)
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    alone.fit(task)
    for found in run(P, fit_branches, True, K):
        torch.testing.assert_close(found, parameters(alone.model), rtol=0, atol=1e-9)


class Positive(nn.Module):
    """`side`, its first layer, is used for positive samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.base = nn.Linear(5, 1).double(), nn.Linear(5, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.side(x) if x.max() > 0 else self.base(x)


def fit_positive(P: int) -> Any:
    strategy = DDPStrategy(find_unused_parameters=True) if P > 1 else "single"
    task = Regression(3, model=Positive)
    task.x[:2], task.x[2] = 1.0, -1.0  # the second update: one sample, on process 0, that does not use `side`
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)  # type: ignore[method-assign]
    trainer = Trainer(strategy, micro_batch_size=1, effective_batch_size=2, max_epochs=2, shuffle=False)
    trainer.fit(task)
    return parameters(trainer.model)


def test_a_parameter_that_nobody_used_is_not_decayed_for_a_process_without_data() -> None:
    alone = fit_positive(1)
    for found in run(2, fit_positive, 2):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


def test_a_gradient_that_was_not_reduced_is_an_error_that_names_it() -> None:
    with pytest.raises(ChildError, match=r"did not use these parameters: .*never\.weight.*find_unused_parameters=True"):
        run(2, fit_branches, False, 2)


class UsesAll(Branches):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        everywhere = self.left(x) + self.right(x)
        return everywhere if dist.get_rank() == 1 and x[0, 0] < 0 else everywhere + self.never(x)


def test_a_parameter_that_one_process_did_not_use_is_named_on_all() -> None:
    def fit_uses_all() -> None:
        strategy = DDPStrategy(timeout_seconds=20, bucket_cap_mb=1e-4)
        Trainer(strategy, micro_batch_size=2, accumulate_grad_batches=2, max_epochs=3).fit(
            Regression(23, model=UsesAll)
        )

    with pytest.raises(ChildError) as raised:
        run(2, fit_uses_all, seconds=15)
    parameters_ = "did not use these parameters: never.weight, never.bias"
    assert f"process 1: the last micro-batch of the window {parameters_}" in raised.value.errors[1]
    assert "process 1 failed: RuntimeError: process 1: the last micro-batch of the window" in raised.value.errors[0]


@pytest.mark.parametrize(
    ("strategy", "owner", "part"),
    [
        (DDPStrategy, "torch.nn.parallel:DistributedDataParallel", "_sync_buffers"),
        (FSDPStrategy, "torch.distributed.fsdp:FSDPModule", "_get_fsdp_state"),
    ],
)
def test_a_torch_that_lacks_something_is_named_before_anything_starts(
    strategy: Any, owner: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delattr(resolve_name(owner), part, raising=False)
    message = rf"{owner}[:.]{part},.* which torch {torch.__version__[:4]}.* is tested with torch 2\.10 to 2\.15"
    with pytest.raises(RuntimeError, match=message):
        strategy().setup()
    assert not dist.is_initialized()


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "CPU"])
def test_a_device_is_a_kind_of_devices(device: Any) -> None:
    for strategy in (DDPStrategy, FSDPStrategy, PipelineStrategy):
        with pytest.raises(ValueError, match=f"device='{device}': expected 'cpu' or 'cuda', or None"):
            strategy(device=device)
    with pytest.raises(ValueError, match=f"device_type='{device}': expected 'cuda' or 'cpu', or None"):
        DPStrategy(device_type=device)
