"""A module written for Lightning sees the same run in both: hooks, counters, LR schedulers, what it logs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from engine import Loss, Trainer
from engine.adapters import Lightning
from tests.kit.processes import run
from tests.kit.reference import Watch, data, mlp, parameters

SAMPLES, N, K, EPOCHS = 44, 4, 3, 2  # a short last window; at P = 2 a process without a micro-batch in it
HOOKS = [
    *["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward"],
    *["on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_train_end"],
    *["on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end"],
    *["on_validation_epoch_end", "on_validation_end", "on_fit_end", "on_before_batch_transfer"],
    *["on_after_batch_transfer"],
]


class Shape:
    """What both kinds have, whatever they derive from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.log("mse", nn.functional.mse_loss(self.layers(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(SAMPLES)), batch_size=N)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(13, seed=1)), batch_size=N)


class Duck(Shape, nn.Module):
    """Without Lightning."""


def of(base: type, **methods: Any) -> Any:
    return type("Changed", (base,), {"__module__": __name__, **methods})()


def fit(module: Any, **options: Any) -> tuple[Trainer, Watch]:
    watch = Watch()
    options = {"accumulate_grad_batches": K, "max_epochs": EPOCHS, "shuffle": False, "callbacks": watch} | options
    trainer = Trainer("ddp", N, **options)
    trainer.fit(Lightning(module))
    return trainer, watch


def recording(base: type, events: list[Any], divisor: int = 1) -> Any:
    """A module that notes each call, with what it is told (losses times `divisor`) and what it can ask for."""

    def noting(name: str) -> Any:
        def note(self: Any, *arguments: Any) -> Any:
            numbers = [argument for argument in arguments if isinstance(argument, int)]
            shapes = [tuple(argument[0].shape) for argument in arguments if isinstance(argument, list | tuple)]
            outputs = [round(divisor * a["loss"].item(), 6) for a in arguments if isinstance(a, dict)]
            asked = self.trainer.current_epoch, self.trainer.global_step, self.training, torch.is_grad_enabled()
            rates = [self.optimizer.param_groups[0]["lr"]] if name == "on_train_batch_start" else []
            events.append((name, numbers, shapes, outputs, *asked, rates))
            if name in ("training_step", "validation_step"):
                return getattr(Shape, name)(self, *arguments)
            return arguments[0] if "transfer" in name else None

        return note

    def configure(self: Any) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-9)  # the short window is another update there
        self.asked = self.trainer.estimated_stepping_batches, self.trainer.max_epochs, self.trainer.world_size
        return [self.optimizer], [StepLR(self.optimizer, 1, 0.5)]

    steps = ["training_step", "validation_step"]
    return of(base, configure_optimizers=configure, **{name: noting(name) for name in HOOKS + steps})


def test_hooks_are_called_where_lightning_calls_them() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    base = type("Real", (Shape, lightning.LightningModule), {"__module__": __name__})
    there, here, alone = [], [], []
    module = recording(base, there, K)  # Lightning tells its hooks a K-th of the loss
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    options = {"accumulate_grad_batches": K, "max_epochs": EPOCHS, "num_sanity_val_steps": 0, "barebones": False}
    lightning.Trainer(accelerator="cpu", **quiet, **options).fit(module)
    for events, kind in ((here, base), (alone, Duck)):
        again = recording(kind, events)
        fit(again)
        assert again.asked == module.asked == (8, EPOCHS, 1)
        for place, (mine, theirs) in enumerate(zip(events, there, strict=False)):
            assert mine == theirs, (place, events[place - 3 : place + 3], there[place - 3 : place + 3])
        assert len(events) == len(there)
    assert {event[0] for event in there} == {*HOOKS, "training_step", "validation_step"}


def test_an_epoch_that_max_updates_ends_has_the_hook_of_its_end() -> None:
    events: list[Any] = []
    fit(recording(Duck, events), max_epochs=None, max_updates=2)
    assert [name for name, *_ in events if name.startswith("on_train_e")] == [
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_end",
    ]


@pytest.mark.parametrize("P", [1, 2])
def test_what_training_logs_is_the_mean_over_the_window_and_all_processes(P: int) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.log("x", x.mean(), prog_bar=True)
        self.log_dict({"twice": 2 * x.mean(), "alike": x[:1].mean()}, batch_size=1)
        return nn.functional.mse_loss(self.layers(x), y)

    x, _ = data(SAMPLES)
    windows = x.split(P * N * K)
    for _, watch in run(P, lambda: (None, fit(of(Duck, training_step=step))[1].records)):
        assert [r["x"] for r in watch] == pytest.approx([w.mean().item() for w in windows] * EPOCHS, abs=1e-12)
        firsts = [torch.stack([m[0].mean() for m in w.split(N)]).mean().item() for w in windows]
        assert [r["alike"] for r in watch] == pytest.approx(firsts * EPOCHS, abs=1e-12)


class Covered:
    """A metric that is not a mean, without torchmetrics: the median of all products."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._forward_cache: Any = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.seen += (x * y).tolist()
        self._forward_cache = (x * y).median()

    def compute(self) -> float:
        return sorted(self.seen)[len(self.seen) // 2]

    def merge_state(self, other: Covered) -> None:
        self.seen += other.seen

    def reset(self) -> None:
        self.seen = []

    def to(self, device: Any) -> Covered:
        return self


def big_batches(P: int) -> list[Any]:
    return list(zip(*(values.split(P * N * K) for values in data(SAMPLES)), strict=True))


def logging_metrics(make: Any) -> Any:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.of_training(batch[0][:, 0], batch[1][:, 0])
        self.log("order", self.of_training)
        return Shape.training_step(self, batch, batch_idx)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.of_validation(batch[0][:, 0], batch[1][:, 0])
        self.log("order", self.of_validation)

    module = of(Duck, training_step=training_step, validation_step=validation_step)
    module.of_training, module.of_validation = make(), make()
    return module


@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("kind", ["own", "torchmetrics"])
def test_a_metric_object_is_computed_over_all_samples_and_reset(kind: str, P: int) -> None:
    """5 samples of validation in pieces of 4: at P = 3 one process has none."""
    make = Covered if kind == "own" else pytest.importorskip("torchmetrics.regression").SpearmanCorrCoef

    def trained() -> Any:
        module = logging_metrics(make)
        module.val_dataloader = lambda: None
        watch, few = Watch(), TensorDataset(*data(5, seed=1))
        trainer = Trainer("ddp", N, accumulate_grad_batches=K, max_epochs=2, callbacks=watch, shuffle=False)
        trainer.fit(Lightning(module, validation=few))
        return dict(trainer.metrics), [record["order"] for record in watch.records]

    def whole(samples: int, seed: int = 0) -> float:
        metric, (x, y) = make(), data(samples, seed)
        metric(x[:, 0], y[:, 0])
        return float(metric.compute())

    windows = [[(m[0][:, 0] * m[1][:, 0]) for m in zip(x.split(N), y.split(N), strict=True)] for x, y in big_batches(P)]
    steps = [sum(len(m) * m.median() for m in w).item() / sum(map(len, w)) for w in windows]
    for metrics, records in run(P, trained):
        exactly = 1e-12 if kind == "own" else 1e-6  # its states are in float32
        assert metrics["order"] == pytest.approx(whole(5, 1), abs=exactly)
        assert metrics["order_epoch"] == pytest.approx(whole(SAMPLES), abs=exactly)
        assert kind != "own" or records == pytest.approx(steps * 2, abs=1e-12)


def test_what_hooks_log_is_recorded() -> None:
    def mean_of(value: float) -> Any:
        def hook(self: Any, *_: Any) -> None:
            self.log("hooked", value + self.trainer.global_rank)

        return hook

    module = {"on_validation_epoch_end": mean_of(10.0), "on_before_optimizer_step": mean_of(20.0)}
    for trainer_metrics, records, rank in run(2, lambda: hooked(of(Duck, **module))):
        assert trainer_metrics["hooked"] == 10.5  # the same on all processes, which stop and save by it
        assert "mse" in trainer_metrics
        assert [r["hooked"] for r in records] == [20.0 + rank] * len(records)


def hooked(module: Any) -> Any:
    trainer, watch = fit(module)
    return dict(trainer.metrics), watch.records, trainer.strategy.rank


def by_plateau(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)  # the error falls: each validation is worse
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "mse"}}


def every_third(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    schedulers = [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", "frequency": 3}]
    return [optimizer], [*schedulers, StepLR(optimizer, 1, 0.1)]


def by_itself(self: Any, scheduler: Any, metric: Any) -> None:
    assert metric is None
    scheduler.step()
    scheduler.step()


def test_schedulers_move_as_lightning_moves_them() -> None:
    def rates(**methods: Any) -> list[float]:
        return [record["lr"] for record in fit(of(Duck, **methods), max_epochs=3)[1].records]

    assert rates(configure_optimizers=by_plateau) == [0.1] * 8 + [0.05] * 4
    third = rates(configure_optimizers=every_third)
    factors = [0.5 ** (update // 3) * 0.1 ** (update // 4) for update in range(12)]
    assert third == pytest.approx([0.1 * factor for factor in factors])
    both = rates(configure_optimizers=every_third, lr_scheduler_step=by_itself)
    assert both[:3] == [0.1] * 3
    assert both[3] == pytest.approx(0.1 * 0.25)


def test_an_interrupted_run_continues_its_schedulers_and_its_batch_idx(tmp_path: Any) -> None:
    def noting(seen: list[int], last: int = 0) -> Any:
        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            seen.append(batch_idx)
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return Shape.training_step(self, batch, batch_idx)

        return of(Duck, configure_optimizers=every_third, training_step=step)

    whole: list[int] = []
    trainer, watch = fit(noting(whole))
    parts: list[int] = []
    rates = []
    for last in (8, 21, 0):  # in the middle of a window, of an epoch and of three updates
        again, seen = fit(noting(parts, last), run_dir=str(tmp_path / "run"))
        rates += [record["lr"] for record in seen.records]
    assert whole == [*range(11)] * 2
    assert parts == [*range(8), *range(6, 11)] * 2  # windows that were dropped are run again
    assert rates == [record["lr"] for record in watch.records]
    assert torch.equal(parameters(again.model), parameters(trainer.model))


def test_its_early_stopping_is_the_engines_and_should_stop_stops() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def stopping(self: Any) -> Any:
        return [callbacks.EarlyStopping("mse", patience=1, mode="max")]

    assert fit(of(Duck, configure_callbacks=stopping), max_epochs=9)[0].update == 8  # worse in the second epoch

    def at_once(self: Any, *_: Any) -> None:
        self.trainer.should_stop = True

    assert fit(of(Duck, on_train_batch_end=at_once), max_epochs=9)[0].update == 1


def test_all_that_cannot_be_is_named_at_once() -> None:
    methods = {"optimizer_step": lambda self: None, "on_save_checkpoint": lambda self, c: None, "backward": None}
    with pytest.raises(ValueError, match=r"(?s)optimizer_step: .*on_save_checkpoint: .*automatic_optimization=False"):
        Lightning(of(Duck, automatic_optimization=False, **methods))
    with pytest.raises(ValueError, match=r"monitor='loss' cannot .* use one of .'mse'"):
        fit(of(Duck, configure_optimizers=lambda self: wrong_monitor(self)))


def wrong_monitor(self: Any) -> Any:
    found = by_plateau(self)
    return {**found, "lr_scheduler": {**found["lr_scheduler"], "monitor": "loss"}}


@pytest.fixture
def demos() -> Iterator[Any]:
    return pytest.importorskip("lightning.pytorch.demos.boring_classes")


def test_the_demo_models_of_lightning_train(demos: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trained = []
    for fit_it in (
        lambda m: lightning.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, **quiet).fit(m),
        lambda m: Trainer("single", 1, max_epochs=2, shuffle=False).fit(Lightning(m)),
    ):
        torch.manual_seed(3)
        model = demos.BoringModel()
        rows = DataLoader(demos.RandomDataset(32, 16))
        model.train_dataloader = lambda rows=rows: rows
        fit_it(model)
        trained.append(parameters(model))
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-6)


def test_a_data_module_is_data(demos: Any) -> None:
    trainer = Trainer("single", 8, accumulate_grad_batches=2, max_epochs=1)
    task = Lightning(demos.BoringModel(), demos.BoringDataModule())
    trainer.fit(task)
    assert (trainer.update, trainer.samples) == (4, 64)
    assert set(trainer.metrics) == {"x"}
    with pytest.raises(ValueError, match=r"(?s)ManualOptimBoringModel cannot .*automatic_optimization=False"):
        Lightning(demos.ManualOptimBoringModel())


def test_a_batch_of_another_kind_of_loss_is_told_to_hooks() -> None:
    seen: list[float] = []

    def step(self: Any, batch: Any) -> Any:
        return {"loss": Loss(self.layers(batch[0]).sum(), 2), "rows": batch[0]}

    def end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen.append(len(outputs["rows"]) + 100 * outputs["loss"].requires_grad)

    fit(of(Duck, training_step=step, on_train_batch_end=end), max_epochs=1)
    assert seen == [N] * 11
