"""Samples are collated as by torch's `default_collate`: every kind of sample, also of types that it was taught."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from engine.collate import collated

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


def test_a_worker_s_batch_is_in_shared_memory() -> None:
    def is_shared(samples: list[Any]) -> tuple[list[bool], Any]:
        batch = collated(samples)
        return [tensor.is_shared() for tensor in batch], batch

    for shared, batch in DataLoader(KINDS["pairs"], 3, num_workers=1, collate_fn=is_shared):
        assert shared == [True, True]
        assert described(batch) == described(default_collate(KINDS["pairs"]))
