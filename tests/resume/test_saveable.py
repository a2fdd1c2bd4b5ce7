"""State that no checkpoint can hold is refused at once, on all processes; all else resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from engine import Callback, Trainer
from strategies.registry import find
from tests.kit.buffers import PLACES, every_kind
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, mlp


class Keeps(Callback):
    """A callback whose state is `value`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"mine": self.value}


class Stream:
    """Micro-batches; its state is `value` once it has been read."""

    def __init__(self, value: Any) -> None:
        self.value, self.state = value, None

    def __iter__(self) -> Any:
        for _ in range(6):
            self.state = self.value
            yield torch.ones(4, 5).double(), torch.ones(4, 1).double(), torch.arange(4)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class KeepsObject(torch.optim.SGD):
    """An optimizer with a state that is not a number, from its first step on."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["memory"] = object()


class Extra(nn.Linear):
    """A module with a state of its own."""

    def get_extra_state(self) -> Any:
        return b"bytes"

    def set_extra_state(self, state: Any) -> None:
        pass


def with_buffer(value: Tensor, persistent: bool = True) -> nn.Module:
    model = mlp()
    model.register_buffer("table", value, persistent=persistent)
    return model


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)


def task(**methods: Any) -> Regression:
    changed = Regression(24)
    for name, method in methods.items():
        setattr(changed, name, method)
    return changed


class Counts(torch.optim.SGD):
    """An optimizer with a state that belongs to no parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["steps"] = self.state.get("steps", 0) + 1
        super().step()


CASES: dict[str, tuple[Any, str, int]] = {
    "complex": (lambda: task(model=lambda: with_buffer(torch.zeros(3, dtype=torch.complex128))), "model.table", 0),
    "quantised": (lambda: task(model=lambda: with_buffer(quantised())), "model.table", 0),
    "sparse": (lambda: task(model=lambda: with_buffer(torch.eye(3).to_sparse())), "model.table", 0),
    "extra": (lambda: task(model=lambda: nn.Sequential(Extra(5, 1)).double()), "model.0._extra_state", 0),
    "callback": (lambda: Keeps({1, 2}), "callbacks.0.1.mine", 0),
    "array": (lambda: Keeps(numpy.ones(2)), "callbacks.0.1.mine", 0),
    "stream": (lambda: task(train_data=lambda: Stream(object())), "position", 1),
    "no parameter's": (
        lambda: task(configure_optimizer=lambda model: Counts(model.parameters(), lr=0.1)),
        "the optimizer's state has key 'steps'",
        1,
    ),
    "optimizer": (
        lambda: task(configure_optimizer=lambda model: KeepsObject(model.parameters(), lr=0.1)),
        "optimizer.state.0.memory",
        1,
    ),
}


def fit_case(case: str, folder: str, only_rank: int | None) -> None:
    made = CASES[case][0]()
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    keeps = made if isinstance(made, Keeps) else Callback()
    trained = Regression(24) if isinstance(made, Keeps) else made
    if only_rank not in (None, rank):
        trained = task(train_data=lambda: Stream(3))
    trainer = Trainer(micro_batch_size=4, max_epochs=1, run_dir=folder, callbacks=keeps)
    try:
        trainer.fit(trained)
    except ValueError as error:
        raise ValueError(f"after {trainer.update} updates: {error}") from None


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_saved_is_refused_at_once(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"after {CASES[case][2]} updates: .*{CASES[case][1]}.* expected"):
        fit_case(case, str(tmp_path / "run"), None)


@pytest.mark.parametrize(("case", "only_rank"), [("callback", None), ("stream", 0), ("stream", 1)])
def test_all_processes_learn_of_it(case: str, only_rank: int | None, tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=CASES[case][1]) as raised:
        run(2, fit_case, case, str(tmp_path / "run"), only_rank)
    assert all(CASES[case][1] in text for text in raised.value.errors.values())
    assert len(raised.value.errors) == 2


def test_without_a_folder_nothing_must_be_saved() -> None:
    Trainer(micro_batch_size=4, max_epochs=1, callbacks=Keeps(object())).fit(CASES["sparse"][0]())


def test_a_buffer_that_is_not_saved_may_be_of_any_kind(tmp_path: Path) -> None:
    model = with_buffer(torch.eye(3).to_sparse(), persistent=False)
    Trainer(micro_batch_size=4, max_epochs=1, run_dir=str(tmp_path / "run")).fit(task(model=lambda: model))


class Shares(nn.Module):
    """One tensor is a buffer of two modules; one is a view that repeats a number, one is conjugate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(5, 1).double(), nn.Module()
        steps = torch.zeros(1, dtype=torch.float64)
        self.register_buffer("steps", steps, persistent=False)
        self.other.register_buffer("steps", steps, persistent=False)
        self.register_buffer("repeated", torch.zeros(1).expand(5))
        self.register_buffer("conjugate", torch.ones(3, dtype=torch.complex64).conj(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(0.1)
        return self.layer(x) * (1 + self.other.steps)  # type: ignore[operator]


class Shared(Regression):
    """One sample is NaN: its update is skipped."""

    def __init__(self) -> None:
        super().__init__(32, model=Shares, lr=0.01)
        self.x[30] = float("nan")


def test_buffers_that_share_memory(tmp_path: Path) -> None:
    found = []
    for folder, at in (("whole", 8), ("parts", 4), ("parts", 8)):
        trainer = Trainer("single", micro_batch_size=4, max_updates=at, shuffle=False, run_dir=str(tmp_path / folder))
        trainer.fit(Shared())
        found.append((trainer.skipped, [p.tolist() for p in trainer.model.parameters()], trainer.model.steps.tolist()))
    assert found[0] == found[2]
    assert found[0][0] == 1


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    for at in (2, 6):
        stream = Stream(numpy.int64(3))
        trainer = Trainer(micro_batch_size=4, max_epochs=1, max_updates=at, run_dir=str(tmp_path / "run"))
        trainer.fit(task(train_data=lambda stream=stream: stream))
        assert trainer.update == at


def every_kind_twice() -> nn.Module:
    """One of each for both stages of a pipeline."""
    return nn.Sequential(*every_kind(), nn.Linear(1, 5).double(), *every_kind())


def fit_in_parts(name: str, options: dict[str, Any], folder: str, at: int | None) -> Any:
    strategy = find(name)(**options)
    K = strategy.micro_batches or 1
    N = 4 // strategy.data_parallel_size // K
    trainer = Trainer(
        strategy, micro_batch_size=N, accumulate_grad_batches=K, max_epochs=2, max_updates=at, run_dir=folder
    )
    found: dict[str, Any] = {}
    end = Callback()
    end.on_fit_end = lambda trainer: found.update(state(trainer))  # type: ignore[method-assign]
    trainer.callbacks.append(end)
    trainer.fit(Regression(32, model=every_kind_twice))
    return found


def state(trainer: Any) -> dict[str, Any]:
    model = trainer.strategy._model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: getattr(t, "_local_tensor", t).detach().tolist() for n, t in tensors.items() if not t.is_meta}


@pytest.mark.parametrize(("name", "options", "P"), PLACES, ids=[place[0] for place in PLACES])
def test_buffers_of_every_kind_are_resumed_to_the_bit(
    name: str, options: dict[str, Any], P: int, tmp_path: Path
) -> None:
    whole = run(P, fit_in_parts, name, options, str(tmp_path / "whole"), None, group=P > 1)
    run(P, fit_in_parts, name, options, str(tmp_path / "parts"), 5, group=P > 1)
    assert run(P, fit_in_parts, name, options, str(tmp_path / "parts"), None, group=P > 1) == whole
