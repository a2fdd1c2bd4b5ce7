"""Several optimizers that step together are one: in steps, clipping, skips, learning rates, records and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from engine import Accumulator, Callback, Optimizers, Trainer, parameter_groups
from engine.callbacks import EMA, EpochLR
from strategies import DDPStrategy, DPStrategy, FSDPStrategy, PipelineStrategy, SingleDeviceStrategy, Strategy
from tests.kit.optimizers import KeepModel, is_matrix, tower
from tests.kit.processes import run
from tests.kit.reference import Regression, in_order, parameters

SAMPLES, B, EPOCHS, CLIP = 24, 12, 3, 0.2


def two(model: nn.Module) -> Any:
    matrices, rest = parameter_groups(model, matrices=is_matrix, rest="*")
    first, second = SGD([matrices], lr=0.2, momentum=0.9), AdamW([rest], lr=0.01)
    return [(first, LambdaLR(first, lambda update: 1 / (1 + update))), (second, StepLR(second, 2, 0.5))]


class Two(Regression):
    """Learns by two optimizers; the samples from `poison` on are not finite."""

    def __init__(self, poison: int = SAMPLES) -> None:
        super().__init__(SAMPLES, model=tower)
        self.y[poison:] = float("inf")

    def configure_optimizer(self, model: nn.Module) -> Any:
        return two(model)


def one_big_batch(task: Two) -> torch.Tensor:
    """The reference: each optimizer and each scheduler called by hand; an update that is not finite is left out."""
    torch.manual_seed(0)
    model = task.model()
    pairs = two(model)
    for rows in in_order(SAMPLES, B) * EPOCHS:
        model.zero_grad()
        nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)]).backward()
        is_finite = clip_grad_norm_(model.parameters(), CLIP).isfinite()
        for optimizer, scheduler in pairs:
            if is_finite:
                optimizer.step()
            else:
                optimizer._opt_called = True  # so that torch does not warn
            scheduler.step()
    return parameters(model)


def fit(strategy: Strategy, N: int, task: Regression, **settings: Any) -> Any:
    settings = {"max_epochs": EPOCHS, "effective_batch_size": B, **settings}
    trainer = Trainer(strategy, N, gradient_clip_norm=CLIP, shuffle=False, callbacks=KeepModel(), **settings)
    trainer.fit(task)
    return trainer.callbacks[0].vector if strategy.rank == 0 else None, trainer.record


@pytest.mark.parametrize("poison", [SAMPLES, 20], ids=["finite", "skipped"])
@pytest.mark.parametrize(
    ("P", "strategy", "N"),
    [
        (1, SingleDeviceStrategy("cpu"), 12),
        (1, DPStrategy(2, "cpu"), 4),
        (2, DDPStrategy(), 3),
        (3, DDPStrategy(shard_optimizer=True), 2),
        (2, FSDPStrategy(), 2),
        (2, PipelineStrategy(stages=2, micro_batches=3), 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_several_step_as_each_would_by_hand(P: int, strategy: Strategy, N: int, poison: int) -> None:
    task = Two(poison)
    (values, record), *_ = run(P, fit, strategy, N, task, group=P > 1)
    torch.testing.assert_close(values, one_big_batch(task), rtol=0, atol=1e-12)
    assert record["skipped"] == (0 if poison == SAMPLES else EPOCHS)
    rates = {name: rate for name, rate in record.items() if name.startswith("lr")}
    assert rates == {"lr": 0.2 / 6, "lr/matrices": 0.2 / 6, "lr/rest": 0.01 * 0.25}


def test_one_group_is_recorded_as_before() -> None:
    trainer = Trainer("single", 4, max_updates=1, callbacks=Callback())
    trainer.fit(Regression(8))
    assert [name for name in trainer.record if name.startswith("lr")] == ["lr"]


def test_groups_without_a_name_are_recorded_by_class_and_index() -> None:
    class Unnamed(Regression):
        def configure_optimizer(self, model: Any) -> Any:
            last = AdamW([{"params": model[2].parameters()}, {"params": model[4].parameters(), "lr": 0.5}], lr=0.1)
            return SGD(model[0].parameters(), lr=0.3), last

    trainer = Trainer("single", 4, max_updates=1, callbacks=Callback())
    trainer.fit(Unnamed(8))
    rates = {name: rate for name, rate in trainer.record.items() if name.startswith("lr")}
    assert rates == {"lr": 0.3, "lr/SGD": 0.3, "lr/AdamW.1": 0.1, "lr/AdamW.2": 0.5}


# One optimizer of torch


def stepped(model: Any) -> tuple[Optimizers, list[Optimizer]]:
    parts: list[Optimizer] = [SGD([model[0].weight, model[0].bias], lr=1.0, momentum=0.9), AdamW(model[2].parameters())]
    both = Optimizers(*parts)
    model(torch.randn(3, 5).double()).sum().backward()
    for parameter in both.param_groups:
        assert parameter["params"]
    both.step()
    return both, parts


def assert_one(both: Optimizers, parts: list[Optimizer]) -> None:
    groups = [group for part in parts for group in part.param_groups]
    assert len(groups) == len(both.param_groups)
    assert all(found is group for found, group in zip(both.param_groups, groups, strict=True))
    state = both.state
    assert all(part.state is state for part in parts)


@pytest.mark.parametrize("alone", [False, True], ids=["together", "each by itself"])
def test_the_groups_stay_those_of_the_optimizers_after_loading(alone: bool) -> None:
    saved, parts = stepped(tower())
    both, loaded = stepped(tower())
    scheduler, own = LambdaLR(both, lambda update: 0.5**update), StepLR(loaded[1], 1, 0.1)
    assert_one(both, loaded)
    if alone:
        for part, other in zip(loaded, parts, strict=True):
            part.load_state_dict(other.state_dict())
    else:
        both.load_state_dict(saved.state_dict())
    assert_one(both, loaded)
    for group, other in zip(both.param_groups, saved.param_groups, strict=True):
        for mine, its in zip(group["params"], other["params"], strict=True):
            assert both.state[mine].keys() == saved.state[its].keys()
            assert all(torch.equal(both.state[mine][key], value) for key, value in saved.state[its].items())
    assert both.state_dict()["param_groups"] == saved.state_dict()["param_groups"]
    scheduler.step()
    assert [group["lr"] for group in (loaded[0].param_groups[0], loaded[1].param_groups[0])] == [0.5, 0.0005]
    own.step()
    assert both.param_groups[1]["lr"] == pytest.approx(0.00005)


def test_a_group_is_added_to_one_of_them() -> None:
    model: Any = tower()
    both, parts = stepped(model)
    with pytest.raises(ValueError, match="expected a single optimizer"):
        both.add_param_group({"params": model[4].parameters()})
    parts[0].add_param_group({"params": model[4].parameters()})
    assert_one(Optimizers(both), parts)
    with pytest.raises(ValueError, match="closure: expected None"):
        both.step(lambda: 0.0)  # type: ignore[arg-type]


class Unfreeze(Callback):
    """Gives the first of two optimizers a group more after the second update."""

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 2:
            last = trainer.model[4].requires_grad_(True)
            trainer.optimizer.optimizers[0].add_param_group({"params": last.parameters()})


class Thawed(Regression):
    def configure_optimizer(self, model: Any) -> Any:
        model[4].requires_grad_(False)
        return SGD(model[0].parameters(), lr=0.3), AdamW(model[2].parameters(), lr=0.1)


def test_a_group_more_in_the_first_optimizer_is_recorded() -> None:
    trainer = Trainer("single", 4, max_updates=4, callbacks=Unfreeze())
    trainer.fit(Thawed(24, model=tower))
    rates = {name: rate for name, rate in trainer.record.items() if name.startswith("lr/")}
    assert rates == {"lr/SGD.0": 0.3, "lr/SGD.1": 0.3, "lr/AdamW": 0.1}


# Checkpoints


class Muons(Two):
    def configure_optimizer(self, model: nn.Module) -> Any:
        matrices, rest = parameter_groups(model, matrices=is_matrix, rest="*")
        return [torch.optim.Muon([matrices], lr=0.02), AdamW([rest], lr=0.01)]


@pytest.mark.parametrize(
    ("P", "strategy", "then", "task"),
    [
        (1, SingleDeviceStrategy("cpu"), None, Two()),
        (2, DDPStrategy(shard_optimizer=True), None, Two()),
        (2, FSDPStrategy(), None, Muons()),
        (2, FSDPStrategy(), SingleDeviceStrategy("cpu"), Muons()),
    ],
    ids=["single", "zero1", "fsdp", "fsdp to single"],
)
def test_a_run_that_was_interrupted_is_the_one_that_was_not(
    P: int, strategy: Strategy, then: Any, task: Regression, tmp_path: Path
) -> None:
    def leg(name: str, updates: int, strategy: Strategy = strategy, P: int = P) -> Any:
        ends = {"max_epochs": 9, "max_updates": updates, "run_dir": str(tmp_path / name)}
        return run(P, lambda: fit(strategy, 3, task, **ends), group=P > 1)[0]

    leg("in two", 3)
    found = leg("in two", 6) if then is None else leg("in two", 6, then, 1)
    expected = leg("in one", 6)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0 if then is None else 1e-12)
    assert {k: v for k, v in found[1].items() if "lr" in k} == {k: v for k, v in expected[1].items() if "lr" in k}


class Grouped(Two):
    """The same two groups in one fused AdamW, or in one each."""

    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.is_one = is_one

    def configure_optimizer(self, model: nn.Module) -> Any:
        groups = parameter_groups(model, matrices=is_matrix, rest="*")
        groups[1]["lr"] = 0.002
        if self.is_one:
            return AdamW(groups, lr=0.01, fused=True)
        return [AdamW([group], lr=0.01, fused=True) for group in groups]


def averages(strategy: Strategy, is_one: bool, folder: str, updates: int) -> Any:
    callbacks = [KeepModel(), EMA(0.5), EpochLR(lambda optimizer: StepLR(optimizer, 1, 0.7))]
    settings: Any = {"lr_rule": "linear", "lr_reference_batch": 10, "max_updates": updates, "run_dir": folder}
    trainer = Trainer(strategy, 3, 4 // strategy.data_parallel_size, shuffle=False, callbacks=callbacks, **settings)
    trainer.fit(Grouped(is_one))
    rates = {name: rate for name, rate in trainer.record.items() if name.startswith("lr")}
    return callbacks[0].vector, torch.cat([value.flatten() for value in callbacks[1].averages.values()]), rates


@pytest.mark.parametrize(
    ("P", "strategy"), [(1, SingleDeviceStrategy("cpu")), (2, DDPStrategy())], ids=["single", "ddp"]
)
def test_two_of_a_kind_are_one_with_two_groups_to_the_bit(P: int, strategy: Strategy, tmp_path: Path) -> None:
    def leg(is_one: bool, updates: int) -> Any:
        return run(P, averages, strategy, is_one, str(tmp_path / str(is_one)), updates, group=P > 1)[0]

    leg(False, 4)  # the end of an epoch
    found, expected = leg(False, 7), leg(True, 7)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]
    assert len(found[2]) == 4


def test_another_set_of_optimizers_is_another_run(tmp_path: Path) -> None:
    ends = {"max_updates": 1, "run_dir": str(tmp_path)}
    fit(SingleDeviceStrategy("cpu"), 3, Two(), **ends)
    with pytest.raises(ValueError, match="the optimizer was SGD and AdamW and is Muon and AdamW"):
        fit(SingleDeviceStrategy("cpu"), 3, Muons(), **ends)


# Which parameters each has


def named(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def test_the_first_rule_that_matches_takes_a_parameter() -> None:
    model: Any = tower()
    model[4].requires_grad_(False)
    groups = parameter_groups(model, head="4.*", biases=["*.bias", "nothing"], matrices=is_matrix)
    assert named(groups, model) == {
        "head": ["4.weight", "4.bias"],
        "biases": ["0.bias", "2.bias"],
        "matrices": ["0.weight", "2.weight"],
    }
    assert named(parameter_groups(model, most=["0.*", "2.*"]), model) == {
        "most": ["0.weight", "0.bias", "2.weight", "2.bias"]
    }


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"matrices": is_matrix}, "no rule of matrices matches these parameters"),
        ({"rest": "*", "matrices": is_matrix}, "match no parameter that an earlier rule has left"),
        ({**{f"rule{i}": "nothing" for i in range(20)}, "rest": "*"}, "rule0='nothing'"),
    ],
    ids=["unmatched", "empty", "many empty"],
)
def test_a_rule_that_leaves_or_lacks_parameters_is_named_in_ten_lines(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parameter_groups(wide(), **rules)
    assert len(str(raised.value).splitlines()) <= 10


class Lookahead(SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def of(*optimizers: Any) -> Any:
    return lambda model: [make(model) for make in optimizers]


def first(model: Any) -> Optimizer:
    return SGD(model[0].parameters(), lr=0.1)


def everything(model: Any) -> Optimizer:
    return AdamW(model.parameters())


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (of(first, everything), "in exactly one. These are in:\n    0.weight: SGD and AdamW\n    0.bias: SGD and"),
        (of(first, first), "0.weight: SGD and SGD"),
        (of(first, lambda model: AdamW(model[1].parameters())), "2.weight: none"),
        (of(), "returned no optimizer"),
        (of(first, lambda model: None), "expected an optimizer, an optimizer and an LR scheduler, or a list"),
        (of(first, lambda model: torch.optim.LBFGS(model[1].parameters())), "LBFGS needs a closure"),
        (of(first, lambda model: Lookahead(model[1].parameters())), "Lookahead needs a closure"),
        (lambda model: Optimizers(everything(model), first(model)), "0.weight: AdamW and SGD"),
    ],
)
def test_optimizers_that_do_not_share_the_model_out_are_refused(configure: Any, message: str) -> None:
    task = Regression(8, model=wide)
    task.configure_optimizer = configure  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as raised:
        Trainer("single", 4, max_updates=1).fit(task)
    if "exactly one" in str(raised.value):
        assert len(str(raised.value).splitlines()) <= 10


# In a loop of one's own


def own_loop() -> torch.Tensor:
    task = Two()
    strategy = SingleDeviceStrategy("cpu")
    strategy.setup()
    torch.manual_seed(0)
    model = strategy.prepare(task.model())
    own = Accumulator(strategy, model, two(model), task.train_data(), 3, 4, gradient_clip_norm=CLIP, shuffle=False)
    for epoch in range(EPOCHS):
        for window in own.windows(epoch):
            for batch in window:
                window.backward(task.loss(model, batch))
            window.update()
    return parameters(model)


def test_a_loop_of_ones_own_takes_a_list() -> None:
    torch.testing.assert_close(own_loop(), one_big_batch(Two()), rtol=0, atol=1e-12)
