"""Classes written for Lightning train as tasks: without it, and real ones where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from engine import Loss, Trainer
from engine.adapters import Lightning
from tests.kit.processes import run
from tests.kit.reference import Regression, Watch, big_batch_run, data, in_order, mlp, parameters

SAMPLES, N, K = 44, 4, 3  # a short last window; at P = 2 a process without a micro-batch in it
LR = 0.1


class Shape:
    """What a LightningModule of this kind has, whatever it derives from: it calls layers, never its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log_dict({"mse": nn.functional.mse_loss(self.layers(x), y), "index": batch_idx}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(SAMPLES)), batch_size=7)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(13, seed=1)), batch_size=5)


class Duck(Shape, nn.Module):
    """Without Lightning."""


def real() -> nn.Module:
    module = pytest.importorskip("lightning.pytorch").LightningModule
    return type("Real", (Shape, module), {"__module__": __name__})()


KINDS = {"duck": Duck, "real": real}
kinds = pytest.mark.parametrize("kind", KINDS)


def of(base: type = Duck, **methods: Any) -> nn.Module:
    return type("Changed", (base,), {"__module__": __name__, **methods})()


def fit(make: Callable[[], nn.Module], strategy: str = "ddp", epochs: int = 2, **given: Any) -> Any:
    task, watch = Lightning(make(), **given), Watch()
    trainer = Trainer(strategy, N, accumulate_grad_batches=K, max_epochs=epochs, callbacks=watch, shuffle=False)
    trainer.fit(task)
    names = list(trainer.strategy.state_dict()["model"]) if strategy != "fsdp" else []
    mine = torch.zeros(0) if strategy == "fsdp" else parameters(task.module)
    return mine, trainer.metrics, [r["lr"] for r in watch.records], names, [r["loss"] for r in watch.records]


def reference(P: int, epochs: int = 2, samples: int = SAMPLES) -> Tensor:
    return big_batch_run(Regression(samples, LR), [in_order(samples, P * N * K)] * epochs)


@kinds
@pytest.mark.parametrize("P", [1, 2])
def test_an_update_is_that_of_its_big_batch(kind: str, P: int) -> None:
    if kind == "real":
        real()
    x, y = data(13, seed=1)
    for found, metrics, _, names, _ in run(P, fit, KINDS[kind]):
        torch.testing.assert_close(found, reference(P), rtol=0, atol=1e-12)
        assert names == list(Duck().state_dict())
        model = mlp()
        torch.nn.utils.vector_to_parameters(found, model.parameters())
        assert metrics["mse"] == pytest.approx(nn.functional.mse_loss(model(x), y).item(), abs=1e-12)
        pieces = [(4, 0), (4, 1), (4, 2), (1, 3)] if P == 1 else [(4, 0), (4, 0), (4, 1), (1, 1)]
        assert metrics["index"] == pytest.approx(sum(size * index for size, index in pieces) / 13)


def test_a_part_of_the_model_on_each_process_trains_alike() -> None:
    (sharded, other), replicated = run(2, fit, Duck, "fsdp"), run(2, fit, Duck)[0]
    assert sharded[4] == other[4] == pytest.approx(replicated[4], abs=1e-12)
    assert sharded[1] == pytest.approx(replicated[1], abs=1e-12)


def moving_by_epoch() -> nn.Module:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        return [optimizer], [StepLR(optimizer, 1, 0.5)]

    return of(configure_optimizers=configure)


def moving_by_update() -> nn.Module:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}}

    return of(configure_optimizers=configure)


def test_a_scheduler_moves_by_update_or_by_epoch() -> None:
    updates = -(-SAMPLES // (N * K))
    assert fit(moving_by_update, "single", 1)[2] == [LR * 0.5**update for update in range(updates)]
    assert fit(moving_by_epoch, "single")[2] == [LR] * updates + [LR / 2] * updates


def test_given_data_comes_first_and_a_loader_that_shuffles_is_shuffled_by_the_trainer() -> None:
    small = TensorDataset(*data(8))
    assert torch.equal(fit(Duck, "single", train=small)[0], fit(Duck, "single", train=DataLoader(small))[0])
    task = Lightning(Duck(), train=DataLoader(small, shuffle=True, collate_fn=len), validation=small)
    assert task.train_data() is small
    assert task.order(0) is None
    assert task.collate([1, 2, 3]) == 3
    drawn = DataLoader(small, sampler=WeightedRandomSampler([1.0] * 8, 8))
    assert Lightning(Duck(), train=drawn).train_data() is drawn  # ready micro-batches, in its own order


def test_a_loader_in_order_stays_in_order() -> None:
    trainer = Trainer("single", N, accumulate_grad_batches=K, max_epochs=2)  # shuffle=True
    task = Lightning(Duck())
    trainer.fit(task)
    torch.testing.assert_close(parameters(task.module), reference(1), rtol=0, atol=1e-12)


def test_a_sum_over_tokens_keeps_its_weight() -> None:
    def step(self: Any, batch: Any) -> Any:  # without batch_idx, as Lightning allows
        x, y = batch
        return Loss(2 * (self.layers(x) - y).square().sum(), 2 * len(x))

    for found, *_ in run(2, fit, lambda: of(training_step=step)):
        torch.testing.assert_close(found, reference(2), rtol=0, atol=1e-12)


def test_the_mode_comes_back_after_a_validation() -> None:
    seen = []

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append((self.training, self.layers.training))
        return Duck.training_step(self, batch, batch_idx)

    fit(lambda: of(training_step=step), "single")
    assert set(seen) == {(True, True)}


def two_optimizers(self: Any) -> Any:
    return [torch.optim.SGD(self.parameters(), lr=LR), torch.optim.SGD(self.parameters(), lr=LR)]


def logs_an_object(self: Any, batch: Any, batch_idx: int) -> None:
    self.log("accuracy", object())


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"automatic_optimization": False}, "automatic_optimization=False: the engine makes"),
        ({"on_save_checkpoint": lambda self, checkpoint: None}, "the method on_save_checkpoint: use a callback of"),
        ({"configure_callbacks": lambda self: [object()]}, "the callback object cannot be .*keep_best"),
        ({"optimizer_step": lambda self: None}, "the method optimizer_step: the engine steps. Use on_before"),
        ({"training_step": lambda self, dataloader_iter: None}, "training_step with other arguments"),
        ({"configure_optimizers": two_optimizers}, "2 optimizers cannot .* in Lightning too"),
        ({"configure_optimizers": lambda self: None}, "configure_optimizers returning None"),
        ({"train_dataloader": lambda self: [DataLoader([1])] * 2}, "several DataLoaders cannot"),
        ({"validation_step": logs_an_object}, r"self.log\('accuracy', a object\) cannot"),
        ({"validation_step": lambda self, batch: None}, "logged nothing and returned nothing"),
        ({"training_step": lambda self, batch: self.trainer.strategy}, r"self.trainer.strategy cannot"),
        ({"training_step": lambda self, batch: setattr(self.trainer, "max_epochs", 3)}, "max_epochs = 3 cannot"),
    ],
)
@kinds
def test_what_cannot_be_carried_over_is_refused_by_name(kind: str, methods: dict[str, Any], message: str) -> None:
    base = type(real()) if kind == "real" else Duck
    if "automatic_optimization" in methods and kind == "real":
        methods = {"automatic_optimization": property(lambda self: False, lambda self, value: None)}
    with pytest.raises(ValueError, match=message):
        fit(lambda: of(base, **methods), "single")


def test_what_is_no_such_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear cannot be carried over .* training_step and configure_optimizers"):
        Lightning(nn.Linear(1, 1))
