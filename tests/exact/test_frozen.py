"""Parameters that are frozen, unfrozen, added or replaced during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Accumulator, Callback, Trainer
from engine.callbacks import EMA
from strategies.registry import find
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, mlp, parameters


class Thaws(Callback):
    """Trains the last layer in epoch 0, all but the last in epoch 1, and all from the second update of epoch 2 on."""

    def trains(self, trainer: Any, first: bool, last: bool) -> None:
        trainer.model[0].requires_grad_(first)
        trainer.model[2].requires_grad_(first)
        trainer.model[4].requires_grad_(last)

    def on_epoch_start(self, trainer: Any) -> None:
        if trainer.epoch < 2:
            self.trains(trainer, trainer.epoch == 1, trainer.epoch == 0)

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 9:
            self.trains(trainer, True, True)


class Body(Regression):
    """Momentum: a parameter that is wrongly given the gradient 0 would move."""

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)


def by_hand() -> Any:
    task = Body(31)
    torch.manual_seed(0)
    model = mlp()
    optimizer = task.configure_optimizer(model)
    for update in range(16):
        epoch, window = divmod(update, 4)
        trained = [epoch == 1 or update >= 9, epoch == 0 or update >= 9]
        if update == 8:
            trained = [True, False]  # as in the epoch before
        for layer, is_trained in ((0, trained[0]), (2, trained[0]), (4, trained[1])):
            model[layer].requires_grad_(is_trained)
        rows = slice(8 * window, 8 * window + 8)
        nn.functional.mse_loss(model(task.x[rows]), task.y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


PLACES = {
    "single": (1, "single", {}),
    "dp": (1, "dp", {}),
    "ddp": (2, "ddp", {}),
    "ddp, unused": (2, "ddp", {"find_unused_parameters": True}),
    "ddp, bucket views": (2, "ddp", {"gradient_as_bucket_view": True}),
    "ddp, sharded": (2, "ddp", {"shard_optimizer": True}),
    "ddp of 3": (3, "ddp", {}),
    "pipeline": (2, "pipeline", {"stages": 2, "micro_batches": 2}),
}


def fit(name: str, options: dict[str, Any], callbacks: Any = None, **more: Any) -> Any:
    strategy = find(name)(**options)
    K, P = strategy.micro_batches or 1, strategy.data_parallel_size
    settings: dict[str, Any] = {"effective_batch_size": 8} if P > 1 else {"accumulate_grad_batches": K}
    N = 8 // K if P == 1 else {2: 4, 3: 1}[P]
    trainer = Trainer(
        strategy, micro_batch_size=N, max_epochs=4, shuffle=False, callbacks=callbacks or Thaws(), **settings, **more
    )
    trainer.fit(Body(31))
    return trainer


@pytest.mark.parametrize(("P", "name", "options"), PLACES.values(), ids=PLACES)
def test_freezing_and_unfreezing_is_what_it_would_be_in_a_loop(P: int, name: str, options: dict[str, Any]) -> None:
    @on_processes(P, group=P > 1)
    def results() -> Any:
        trainer = fit(name, options)
        return [(n, p.detach().clone()) for n, p in trainer.model.named_parameters() if not p.is_meta]

    found: dict[str, Any] = {}
    for rank_found in results:
        found |= dict(rank_found)
    model = mlp()
    model.load_state_dict(found)
    torch.testing.assert_close(parameters(model), by_hand(), rtol=0, atol=1e-10)


class Grows(Callback):
    """Adds a layer, or replaces one, or gives the optimizer a parameter, at the event and update that it is told."""

    def __init__(self, how: str, update: int) -> None:
        self.how, self.update, self.ended_at = how, update, -1

    def on_exception(self, trainer: Any, exception: BaseException) -> None:
        self.ended_at = trainer.update

    def on_epoch_start(self, trainer: Any) -> None:
        if trainer.update == self.update:
            self.change(trainer)

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == self.update and trainer.update % 4:
            self.change(trainer)

    def change(self, trainer: Any) -> None:
        layer = nn.Linear(1, 1).double()
        if self.how == "replaced":
            trainer.model[4] = nn.Linear(3, 1).double()
        if self.how == "removed":
            trainer.model[4].bias = None
        if self.how == "grown":
            trainer.model.append(layer)
        if self.how in ("grown", "group"):
            trainer.optimizer.add_param_group({"params": list(layer.parameters())})


@pytest.mark.parametrize(
    ("how", "update"), [("grown", 4), ("grown", 5), ("group", 0), ("group", 6), ("replaced", 4), ("removed", 4)]
)
@pytest.mark.parametrize("place", ["single", "ddp", "fsdp", "pipeline"])
def test_parameters_that_come_or_go_are_refused(place: str, how: str, update: int) -> None:
    P, name, options = PLACES.get(place) or (2, "fsdp", {"find_unused_parameters": True})

    def fit_growing() -> None:
        grows = Grows(how, update)
        try:
            fit(name, options, grows)
        finally:
            assert grows.ended_at == update, "it was found later than before the next update"

    with pytest.raises(ChildError, match="the parameters changed during training") as raised:
        run(P, fit_growing, group=P > 1)
    assert ["the parameters changed" in text for text in raised.value.errors.values()] == [True] * P


def test_fsdp_refuses_to_freeze_during_training() -> None:
    with pytest.raises(
        ChildError, match=r"requires_grad of 0.weight, .* changed during training.*Use DDPStrategy"
    ) as raised:
        run(2, fit, "fsdp", {})
    assert len(raised.value.errors) == 2


def fit_in_parts(folder: str, name: str, options: dict[str, Any], at: int | None) -> Any:
    ema = EMA(0.8)
    trainer = fit(name, options, [Thaws(), ema], run_dir=folder, max_updates=at)
    return parameters(trainer.model), ema.averages, trainer.update


@pytest.mark.parametrize("at", [6, 8, 9, 10])
@pytest.mark.parametrize("place", ["single", "ddp", "ddp of 3"])
def test_a_resumed_run_trains_what_the_run_trained(place: str, at: int, tmp_path: Path) -> None:
    P, name, options = PLACES[place]
    whole = run(P, fit_in_parts, str(tmp_path / "whole"), name, options, None, group=P > 1)
    run(P, fit_in_parts, str(tmp_path / "parts"), name, options, at, group=P > 1)
    resumed = run(P, fit_in_parts, str(tmp_path / "parts"), name, options, None, group=P > 1)
    for found, expected in zip(resumed, whole, strict=True):
        assert found[2] == expected[2] == 16
        assert torch.equal(found[0], expected[0])
        assert {n: a.tolist() for n, a in found[1].items()} == {n: a.tolist() for n, a in expected[1].items()}


def own_loop(kind: str, options: dict[str, Any], late: bool, own: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    """Train two epochs; the middle layer is frozen for one window, before that begins or in the loop's body."""
    strategy = find("ddp")(timeout_seconds=20, **options)
    strategy.setup()
    task = Body(13)
    torch.manual_seed(0)
    inner = mlp()
    model = strategy.prepare(inner)
    data = None if kind == "open" else task.train_data()
    accumulator = Accumulator(strategy, model, task.configure_optimizer(inner), data, 1, 2, shuffle=False)

    def freeze() -> None:
        if strategy.rank in own:
            inner[2].requires_grad_(accumulator.update != 3)  # the last window of epoch 0: one sample

    for epoch in range(2):
        for window in accumulator.windows(epoch) if data else (accumulator.open() for _ in range(4)):
            if late:
                freeze()
            rows = range(strategy.rank, min(4, 13 - 4 * (accumulator.update % 4)), 2)
            for batch in window if data else (task.train_data()[i : i + 1] for i in rows):  # type: ignore[misc]
                window.backward(nn.functional.mse_loss(model(batch[0]), batch[1]), **({} if data else {"samples": 1}))
            window.update()
            if not late:
                freeze()
    return parameters(inner)


def own_loop_by_hand() -> torch.Tensor:
    task = Body(13)
    torch.manual_seed(0)
    model = mlp()
    optimizer = task.configure_optimizer(model)
    for update in range(8):
        model[2].requires_grad_(update != 3)
        start = 4 * (update % 4)
        nn.functional.mse_loss(model(task.x[start : start + 4]), task.y[start : start + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("place", ["ddp", "ddp, unused", "ddp, bucket views"])
def test_a_loop_of_one_s_own_may_freeze_where_it_wants(place: str, late: bool) -> None:
    """Also before a window in which a process has no micro-batch."""
    for found in run(2, own_loop, "windows", PLACES[place][2], late):
        torch.testing.assert_close(found, own_loop_by_hand(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [(0, 1), (0,), (1,)])
def test_freezing_in_an_open_window_is_an_error_on_all(own: tuple[int, ...]) -> None:
    with pytest.raises(ChildError, match="requires_grad changed in an open window") as raised:
        run(2, own_loop, "open", {}, True, own)
    assert ["requires_grad changed in an open" in text for text in raised.value.errors.values()] == [True, True]


@pytest.mark.parametrize("own", [(0,), (1,)])
def test_freezing_on_one_process_in_the_body_is_an_error_on_all(own: tuple[int, ...]) -> None:
    with pytest.raises(ChildError, match="expected the same on all processes") as raised:
        run(2, own_loop, "windows", {}, True, own)
    assert ["expected the same on all" in text for text in raised.value.errors.values()] == [True, True]
