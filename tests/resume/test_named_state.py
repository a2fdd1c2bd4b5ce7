"""A strategy's state: the user's names, copies that share nothing, and no more work than the tensors ask for."""

from __future__ import annotations

import sys
from collections import OrderedDict, namedtuple
from typing import Any

import torch
from torch import nn

from strategies import SingleDeviceStrategy
from strategies.optimizer_state import copy_of

Pair = namedtuple("Pair", "x y")


def trained(layers: int) -> tuple[SingleDeviceStrategy, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)), nn.BatchNorm1d(2))
    model[0].weight = model[1].weight  # tied
    strategy, optimizer = SingleDeviceStrategy("cpu"), torch.optim.AdamW(model.parameters())
    strategy.prepare(model)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return strategy, optimizer


def test_a_state_is_a_copy_under_the_user_s_names() -> None:
    strategy, optimizer = trained(3)
    state, model = strategy.state_dict(optimizer), strategy._model
    assert list(state["model"]) == list(model.state_dict())
    assert set(state["optimizer"]["state"]) == {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        saved = state["model"][name]
        assert torch.equal(saved, value)
        assert saved.data_ptr() != value.data_ptr()
        assert not saved.requires_grad
    for parameter, moments in optimizer.state.items():
        (name,) = (name for name, p in model.named_parameters() if p is parameter)
        for key, value in moments.items():
            saved = state["optimizer"]["state"][name][key]
            assert torch.equal(saved, value)
            assert saved.data_ptr() != value.data_ptr()


def test_other_containers_are_copied_too() -> None:
    x = torch.ones(2)
    found: Any = copy_of({"a": [x, (x, 1)], "b": OrderedDict(c=x), "d": Pair(x, None), "e": 1.5}, torch.clone)
    assert type(found["b"]) is OrderedDict
    assert type(found["d"]) is Pair
    copies = [found["a"][0], found["a"][1][0], found["b"]["c"], found["d"].x]
    assert len({copy.data_ptr() for copy in [x, *copies]}) == 5
    assert all(torch.equal(copy, x) for copy in copies)


def test_a_tensor_is_copied_by_few_calls() -> None:
    def calls(layers: int) -> int:
        strategy, optimizer = trained(layers)
        count = 0

        def see(*event: Any) -> None:
            nonlocal count
            count += event[1] in ("call", "c_call")

        sys.setprofile(see)
        strategy.state_dict(optimizer)
        sys.setprofile(None)
        return count

    assert (calls(60) - calls(20)) / (40 * 8) < 18  # a layer has 2 parameters, and 6 tensors of their optimizer
