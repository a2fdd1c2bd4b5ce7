"""Samples are collated as by torch's `default_collate`: every kind of sample, also of types that it was taught."""

from __future__ import annotations

import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from engine.collate import collated
from engine.data.map_style import MapSource
from engine.data.window import Loading
from engine.order import sequential
from engine.plan.schedule import Schedule, Stage
from engine.plan.windows import Plan
from engine.task import Batching
from strategies import SingleDeviceStrategy

Row = namedtuple("Row", "x y")
X = torch.arange(12.0).reshape(3, 4)


class Marked(Tensor):
    """A subclass, which `default_collate` keeps."""


KINDS: dict[str, Any] = {
    "pairs": [(x, x + 1) for x in X],
    "pairs with numbers and texts": [(x, 1, 2.5, "a", numpy.float64(3), numpy.ones(2)) for x in X],
    "dictionaries": [{"x": x, "y": x + 1} for x in X],
    "dictionaries of all kinds": [{"x": x, "deep": {"y": (x, [x, 1])}, "n": 3} for x in X],
    "a key more": [{"x": X[0]}, {"x": X[1], "y": X[1]}],
    "ordered dictionaries": [OrderedDict(x=x, y=x) for x in X],
    "named tuples": [Row(x, 1) for x in X],
    "lists": [[x, x + 1] for x in X],
    "tensors": list(X),
    "subclasses": [(x.as_subclass(Marked), x) for x in X],
    "0-dim tensors": [(x[0], x.bool()) for x in X],
    "one sample": [(X[0], X[1])],
    "nothing in the samples": [(), ()],
    "tensors that need gradients": [(x.clone().requires_grad_(), x) for x in X],
    "sparse tensors": [(x.to_sparse(), x) for x in X],
    "unequal lengths": [(X[0], X[1]), (X[0],)],
    "unequal shapes": [(X[0],), (X[0, :2],)],
    "a key less": [{"x": X[0], "y": X[0]}, {"x": X[1]}],
    "a tensor and a number": [(X[0],), (1,)],
    "a pair and a tensor": [(X[0], X[1]), X[2]],
    "no samples": [],
    "an array": numpy.ones((3, 2)),
    "an array of numbers": numpy.ones(3),
    "a tensor": X,
    "objects": [(object(), X[0])],
}


def outcome(collate: Any, samples: Any) -> str:
    """Return what `collate` makes of `samples`, with types, or the error that it raises."""
    try:
        return described(collate(samples))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def described(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{type(item).__name__} {item.dtype} {item.requires_grad} {item.tolist()}"
    if isinstance(item, Mapping):
        return f"{type(item).__name__} {[(key, described(value)) for key, value in item.items()]}"
    if isinstance(item, list | tuple):
        return f"{type(item).__name__} {[described(value) for value in item]}"
    return repr(item)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_collated_as_by_torch(kind: str) -> None:
    assert outcome(collated, KINDS[kind]) == outcome(default_collate, KINDS[kind])


@pytest.mark.parametrize("taught", [Tensor, tuple, dict, Mapping, object])
@pytest.mark.parametrize("kind", ["pairs", "dictionaries"])
def test_what_torch_was_taught_is_heeded(kind: str, taught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outcome(collated, KINDS[kind])
    monkeypatch.setitem(default_collate_fn_map, taught, lambda samples, collate_fn_map: "taught")
    assert outcome(collated, KINDS[kind]) == outcome(default_collate, KINDS[kind])
    others = {"pairs": (dict, Mapping), "dictionaries": (tuple,)}[kind]
    assert (outcome(collated, KINDS[kind]) == before) == (taught in others)


COLUMNS: dict[str, Tensor] = {
    "tensors": X,
    "subclasses": X.as_subclass(Marked),
    "sparse": X.to_sparse(),
    "nested": torch.nested.nested_tensor([*X], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("is_taught", [False, True])
def test_a_tensor_dataset_is_collated_as_by_torch(kind: str, is_taught: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_taught:
        monkeypatch.setitem(default_collate_fn_map, Tensor, lambda samples, collate_fn_map: torch.ones(len(samples)))
    data = TensorDataset(COLUMNS[kind])

    def ours(samples: Any) -> Any:
        plan = Plan(len(data), Schedule((Stage(0, 1, len(data)),)))
        source = MapSource(data, sequential(len(data)), plan, 2, Loading(Batching(), SingleDeviceStrategy()))
        return [micro.batch for window in source.windows(0, 0, 0) for micro in window]

    assert outcome(ours, data) == outcome(lambda samples: [*DataLoader(samples, 2)], data)


def test_a_worker_is_sent_a_task_for_its_own_collate_only() -> None:
    batching, data = Batching(), [*X]
    batching.cannot_be_sent = lambda: None  # type: ignore[attr-defined]
    plan = Plan(len(data), Schedule((Stage(0, 1, len(data)),)))
    source = MapSource(data, sequential(len(data)), plan, 2, Loading(batching, SingleDeviceStrategy(), num_workers=1))
    sent = pickle.loads(pickle.dumps(source._fetch))
    assert described(sent.__getitems__((0, 0, [0, 2]))) == described(X[[0, 2]])


def test_a_worker_s_batch_is_in_shared_memory() -> None:
    def is_shared(samples: list[Any]) -> tuple[list[bool], Any]:
        batch = collated(samples)
        return [tensor.is_shared() for tensor in batch], batch

    for shared, batch in DataLoader(KINDS["pairs"], 3, num_workers=1, collate_fn=is_shared):
        assert shared == [True, True]
        assert described(batch) == described(default_collate(KINDS["pairs"]))
