"""Events at a boundary: schedulers, skipped updates, frozen parameters, callbacks, validation, precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine import Callback, Loss, Trainer
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, Samples, Watch, in_order, mlp, parameters


def trainer(**options: Any) -> Trainer:
    settings = {"micro_batch_size": 4, "accumulate_grad_batches": 2, "max_epochs": 2, **options}
    return Trainer(settings.pop("strategy", "single"), **settings)


class Scheduled(Regression):
    def configure_optimizer(self, model: nn.Module) -> Any:
        optimizer = super().configure_optimizer(model)
        total = self.total_updates
        assert total is not None
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: (update + 1) / total)


def test_the_learning_rate_moves_once_per_update() -> None:
    watch = Watch()
    trainer(callbacks=watch).fit(Scheduled(30))
    total = 2 * math.ceil(30 / 8)
    assert [r["lr"] for r in watch.records] == pytest.approx([0.1 * (u + 1) / total for u in range(total)])


class Explodes(Regression):
    """Its loss is not finite for one sample, in forward of whichever process has it."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        factor = torch.where(batch[2] == 9, torch.inf, 1.0).mean()
        return super().loss(model, batch) * factor


class Opposite(Regression):
    """Its losses are infinite, of one sign on one process and of the other on the other."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, _, index = batch
        return Loss(model(x).sum() * 0 + (math.inf if index[0] % 2 else -math.inf), len(x))


def test_losses_that_have_no_sum_are_told_as_nan_and_end_nothing() -> None:
    @on_processes(2)
    def updates() -> int:
        run_ = trainer(strategy="ddp", micro_batch_size=1, accumulate_grad_batches=1, shuffle=False, callbacks=Watch())
        run_.fit(Opposite(4))
        return run_.update if math.isnan(run_.record["loss"]) else 0

    assert updates == [4, 4]


class Before(Callback):
    def on_fit_start(self, trainer: Any) -> None:
        self.start = parameters(trainer.model)

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 1 and trainer.skipped == 1:
            assert torch.equal(self.start, parameters(trainer.model))


def mlp_of_seed() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


@pytest.mark.parametrize(("P", "where"), [(1, [0, 1, 1]), (2, [1, 1])])
def test_an_update_that_is_not_finite_is_skipped_on_all_processes(P: int, where: list[int]) -> None:
    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        before = parameters(mlp_of_seed())
        run_ = trainer(strategy="ddp", max_epochs=1, shuffle=False, callbacks=[watch, Before()])
        run_.fit(Explodes(24))
        return [r["skipped"] for r in watch.records], run_.skipped, parameters(run_.model), before

    for skipped, total, found, _ in results:
        assert skipped == where
        assert total == 1
        assert torch.isfinite(found).all()
        assert torch.equal(found, results[0][2])


class Frozen(Regression):
    def configure_model(self) -> nn.Module:
        model = self.model()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model


def test_frozen_parameters_stay_as_they_are() -> None:
    @on_processes(2)
    def results() -> Any:
        run_ = trainer(strategy="ddp")
        run_.fit(Frozen(30))
        return parameters(run_.model), [p.grad is None for p in run_.model.parameters()]

    for found, _ in results:
        start = parameters(mlp_of_seed())
        assert torch.equal(found[:42], start[:42])
        assert not torch.equal(found[42:], start[42:])


def test_gradients_that_no_optimizer_holds_do_not_leak_into_the_next_window() -> None:
    class Half(Regression):
        def configure_optimizer(self, model: nn.Module) -> Any:
            return torch.optim.SGD(model[0].parameters(), lr=0.0)  # type: ignore[index]

    watch = Watch()
    trainer(callbacks=watch, shuffle=False, max_epochs=3, accumulate_grad_batches=10).fit(Half(30))
    assert [r["grad_norm"] for r in watch.records] == [watch.records[0]["grad_norm"]] * 3


class Events(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            events = object.__getattribute__(self, "events")
            return lambda trainer, *rest: events.append(f"{name[3:]} {trainer.epoch} {trainer.update}")
        return object.__getattribute__(self, name)


class Validated(Regression):
    def validation_data(self) -> Any:
        return Samples(*(t[:10] for t in (self.x, self.y)))


def test_the_order_of_events() -> None:
    events = Events()
    trainer(callbacks=[events], validate_every_n_updates=2).fit(Validated(24))
    assert events.events == [
        "fit_start 0 0",
        "epoch_start 0 0",
        "update_end 0 1",
        "update_end 0 2",
        "validation_end 0 2",
        "update_end 0 3",
        "validation_end 0 3",
        "epoch_end 0 3",
        "epoch_start 1 3",
        "update_end 1 4",
        "validation_end 1 4",
        "update_end 1 5",
        "update_end 1 6",
        "validation_end 1 6",
        "epoch_end 1 6",
        "fit_end 2 6",
    ]


@pytest.mark.parametrize("limit", [None, 6])
@pytest.mark.parametrize(("P", "samples"), [(1, 9), (2, 9), (3, 13), (4, 5)])
def test_a_validation_mean_is_that_over_all_samples_once(P: int, samples: int, limit: int | None) -> None:
    @on_processes(P)
    def results() -> Any:
        task = Validated(samples)
        task.validation_data = lambda: Samples(task.x, task.y)  # type: ignore[method-assign]
        run_ = trainer(strategy="ddp", max_validation_samples=limit, validate_every_n_epochs=None)
        run_.fit(task)
        with torch.no_grad():
            x, y = task.x[:limit], task.y[:limit]
            exact = nn.functional.mse_loss(run_.model(x), y).item()
        return run_.metrics["loss"], exact, run_.validate(task)["loss"], run_.model.training

    for found, exact, again, training in results:
        assert found == pytest.approx(exact, abs=1e-12)
        assert again == found
        assert training


@pytest.mark.parametrize("P", [1, 3])
def test_the_loss_of_a_record_is_the_mean_over_its_window(P: int) -> None:
    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        trainer(strategy="ddp", max_epochs=1, shuffle=False, callbacks=watch).fit(Regression(29))
        return [r["loss"] for r in watch.records], [r["grad_norm"] for r in watch.records]

    for losses, norms in results:
        task, model = Regression(29), mlp_of_seed()
        for loss, norm, rows in zip(losses, norms, in_order(29, P * 8), strict=True):
            exact = nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)])
            gradients = torch.autograd.grad(exact, list(model.parameters()))
            assert loss == pytest.approx(exact.item(), abs=1e-12)
            assert norm == pytest.approx(math.sqrt(sum((g**2).sum().item() for g in gradients)), rel=1e-9)
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.1 * g


class StopsAt(Callback):
    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 2 and trainer.strategy.rank == trainer.strategy.data_parallel_size - 1:
            trainer.stop()


def fit_stopped() -> int:
    run_ = trainer(strategy="ddp", callbacks=StopsAt())
    run_.fit(Regression(100))
    return run_.update


def test_one_process_can_stop_them_all() -> None:
    assert run(1, fit_stopped) == [2]
    assert run(3, fit_stopped) == [3, 3, 3]


def test_max_time_ends_the_run_with_an_update() -> None:
    run_ = trainer(max_time=1e-9)
    run_.fit(Regression(100))
    assert run_.update == 1


def test_a_user_s_order() -> None:
    task, watch = Regression(12), Watch()
    task.order = lambda epoch: [11, 0, 0, 3 + epoch, 5]  # type: ignore[method-assign]
    trainer(micro_batch_size=2, callbacks=watch).fit(task)
    assert watch.samples == [[11, 0, 0, 3], [5], [11, 0, 0, 4], [5]]


def test_an_order_that_changes_its_length_is_refused() -> None:
    task = Regression(12)
    task.order = lambda epoch: list(range(12 - epoch))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="order of epoch 1 has 11 samples, that of epoch 0 12"):
        trainer().fit(task)


def test_datasets_of_samples_and_of_tensors_train_alike() -> None:
    class OneByOne(Regression):
        def train_data(self) -> Any:
            return Samples(self.x, self.y)

    found = []
    for task in (Regression(30), OneByOne(30)):
        run_ = trainer()
        run_.fit(task)
        found.append(parameters(run_.model))
    assert torch.equal(*found)


def test_nothing_is_written_and_switches_are_put_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    trainer(deterministic=True, tf32=True).fit(Regression(8))
    assert not list(tmp_path.iterdir())
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()) == before


def test_on_exception_is_told_and_the_exception_is_raised() -> None:
    class Told(Callback):
        def on_exception(self, trainer: Any, exception: BaseException) -> None:
            self.exception = exception

    class Fails(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            raise ZeroDivisionError("of the task")

    told = Told()
    with pytest.raises(ZeroDivisionError) as raised:
        trainer(callbacks=told).fit(Fails(8))
    assert told.exception is raised.value


class Float(Regression):
    """In float32, with a loss that is weighted by hand."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.x, self.y = self.x.float(), self.y.float()

    def configure_model(self) -> nn.Module:
        return self.model().float()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        out = model(batch[0])
        self.dtype = out.dtype
        return Loss(0.01 * nn.functional.mse_loss(out.float(), batch[1], reduction="sum"), len(out))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)],
)
def test_precision_casts_the_forward_and_keeps_the_parameters(precision: str | None, dtype: torch.dtype) -> None:
    losses = []
    for K, N in ((1, 8), (4, 2)):
        task, watch = Float(32), Watch()
        run_ = trainer(precision=precision, callbacks=watch, accumulate_grad_batches=K, micro_batch_size=N)
        run_.fit(task)
        assert task.dtype == dtype
        assert {p.dtype for p in run_.model.parameters()} == {torch.float32}
        assert run_.skipped == 0
        losses.append([(r["loss"], r["grad_norm"]) for r in watch.records])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2, atol=1e-3)


def test_fp16_overflow_halves_the_scale_and_skips() -> None:
    task, watch = Float(32), Watch()
    run_ = trainer(precision="fp16", callbacks=watch, max_epochs=6)
    base = task.loss
    task.loss = lambda model, batch: Loss(base(model, batch).sum * 1e3, len(batch[0]))  # type: ignore[method-assign]
    run_.fit(task)
    assert 0 < run_.skipped < len(watch.records)
