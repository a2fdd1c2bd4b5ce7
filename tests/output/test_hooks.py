"""Hooks see gradients and weights in time, and what they add to a record or to a validation is recorded."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import Callback, Trainer
from engine.callbacks import EarlyStopping, Progress
from tests.kit.processes import on_processes
from tests.kit.reference import Regression, Samples, big_batch_run, in_order, parameters
from tests.kit.streams import Streamed


class Validated(Regression):
    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])


class Norms(Callback):
    """The norm of each layer's gradient, in the record."""

    def on_gradients(self, trainer: Trainer) -> None:
        named = trainer.model.named_parameters()
        self.norms = {f"norm/{name}": p.grad.norm() for name, p in named if p.grad is not None}

    def on_update_end(self, trainer: Trainer) -> None:
        whole = {name: getattr(norm, "full_tensor", lambda norm=norm: norm)() for name, norm in self.norms.items()}
        trainer.record.update(whole)  # tensors: numbers in the files

    def on_validation_end(self, trainer: Trainer) -> None:
        trainer.metrics["updates"] = torch.tensor(trainer.update)  # as in the record


def reference_norms(windows: list[range]) -> list[dict[str, Tensor]]:
    task = Regression(22)
    torch.manual_seed(0)
    model, found = task.model(), []
    for rows in windows:
        loss = torch.nn.functional.mse_loss(model(task.x[list(rows)]), task.y[list(rows)])
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, [*named.values()])
        found.append({f"norm/{name}": g.norm() for name, g in zip(named, gradients, strict=True)})
        with torch.no_grad():
            for p, g in zip(named.values(), gradients, strict=True):
                p -= task.lr * g
    return found


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("dp", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_norm_per_layer_and_what_a_callback_adds(strategy: str, P: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    @on_processes(P)
    def results() -> Any:
        options = {"keep_best": "max:updates", "loggers": "csv", "run_dir": str(folder)}
        norms, stopping = Norms(), EarlyStopping("updates", 99, "max")
        trainer = Trainer(
            strategy, 2, accumulate_grad_batches=3, max_epochs=2, shuffle=False, callbacks=[norms, stopping], **options
        )
        trainer.fit(Validated(22))
        return {name: float(value) for name, value in trainer.record.items()}, stopping.best

    right = reference_norms(2 * in_order(22, 6 * P))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(updates) == len(rows) == len(right)
    for record, row, norms in zip(updates, rows, right, strict=True):
        for name, norm in norms.items():
            assert record[name] == pytest.approx(norm.item(), rel=1e-12)
            assert float(row[name]) == record[name]
        whole = torch.stack([*norms.values()]).norm().item()
        assert record["grad_norm"] == pytest.approx(whole, rel=1e-12)
    validations = [line for line in lines if "loss" not in line]
    assert [line["validation/updates"] for line in validations] == [line["update"] for line in validations]
    for record, best in results:
        assert {name: record[name] for name in right[-1]} == pytest.approx({n: v.item() for n, v in right[-1].items()})
        assert best == len(right)


class Gap(Callback):
    """A metric that is a number, but no float."""

    def __init__(self, gap: Any) -> None:
        self.gap = gap

    def on_validation_end(self, trainer: Trainer) -> None:
        trainer.metrics["gap"] = self.gap


@pytest.mark.parametrize("gap", [torch.tensor(1.0), True])
def test_a_run_resumes_with_any_number_that_a_callback_has_added(gap: Any, tmp_path: Path) -> None:
    for epochs in (1, 2):
        trainer = Trainer(micro_batch_size=4, max_epochs=epochs, callbacks=Gap(gap), run_dir=str(tmp_path / "run"))
        trainer.fit(Validated(22))
    assert trainer.update == 12
    assert trainer.metrics["gap"] == 1.0
    with pytest.raises(ValueError, match="could not convert string to float: 'wide'"):
        Trainer(micro_batch_size=4, max_epochs=1, callbacks=Gap("wide")).fit(Validated(22))


class Changes(Callback):
    """Halves the gradients, and the weights that are written."""

    def on_gradients(self, trainer: Trainer) -> None:
        torch._foreach_mul_([p.grad for p in trainer.model.parameters()], 0.5)

    def on_save_weights(self, trainer: Trainer) -> None:
        self.trained = parameters(trainer.model)
        with torch.no_grad():
            torch._foreach_mul_([*trainer.model.parameters()], 0.5)


@pytest.mark.parametrize("P", [1, 2])
def test_a_step_takes_the_gradients_and_the_file_the_weights_as_hooks_leave_them(P: int, tmp_path: Path) -> None:
    right = big_batch_run(Regression(22, lr=0.05), [in_order(22, 12)])
    settings: Any = {"effective_batch_size": 12, "shuffle": False, "run_dir": str(tmp_path / "run")}

    @on_processes(P)
    def by_rank() -> Tensor:
        changes = Changes()
        Trainer("auto", 2, max_epochs=1, callbacks=changes, **settings).fit(Regression(22))
        return changes.trained

    for trained in by_rank:
        torch.testing.assert_close(trained, right, rtol=1e-12, atol=1e-13)
    written = load_file(tmp_path / "run" / "model.safetensors")
    model = Regression(22).model()
    model.load_state_dict(written)
    torch.testing.assert_close(parameters(model), trained / 2, rtol=0, atol=0)
    resumed = Trainer("single", 2, max_epochs=2, callbacks=Changes(), **settings)
    resumed.fit(Regression(22))  # from the checkpoint: not from the halved weights
    right = big_batch_run(Regression(22, lr=0.05), [in_order(22, 12)] * 2)
    torch.testing.assert_close(resumed.callbacks[0].trained, right, rtol=1e-12, atol=1e-13)


class Order(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("on_", "around_")):
            self.seen.append(name)
        return super().__getattribute__(name)


class Told:
    def __init__(self, order: Order) -> None:
        self.order = order

    def log(self, record: Any) -> None:
        self.order.seen.append("update is logged" if "loss" in record else "validation is logged")

    def close(self) -> None:
        self.order.seen.append("loggers close")


def test_the_order_is_that_of_the_docs(tmp_path: Path) -> None:
    class Looks(Order):
        def on_gradients(self, trainer: Trainer) -> None: ...

    order = Looks()
    trainer = Trainer(
        micro_batch_size=4, max_epochs=1, callbacks=order, loggers=Told(order), run_dir=str(tmp_path / "run")
    )
    trainer.fit(Validated(4))
    assert order.seen == [
        "on_fit_start",
        "on_epoch_start",
        "on_gradients",
        "on_update_end",
        "update is logged",
        "around_validation",
        "on_validation_end",
        "validation is logged",
        "on_epoch_end",
        "on_save_weights",
        "on_fit_end",
        "loggers close",
    ]


class Ends(Callback):
    def __init__(self) -> None:
        self.ends: list[tuple[int, int]] = []

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.ends.append((trainer.epoch, trainer.update))


@pytest.mark.parametrize("task", [Regression(11), Streamed(11, [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]])])
def test_an_epoch_ends_once_and_not_where_the_run_ends_within_it(task: Any, tmp_path: Path) -> None:
    """Three updates an epoch: the run ends within it, is extended to its end, and then beyond it."""
    seen = []
    for last in (2, 3, 5):
        ends = Ends()
        trainer = Trainer(micro_batch_size=4, max_updates=last, callbacks=ends, run_dir=str(tmp_path / "run"))
        trainer.fit(task)
        seen.append(ends.ends)
    assert seen == [[], [(0, 3)], []]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Validated, {"max_epochs": 2}),
        (Validated, {"max_epochs": 2, "validate_every_n_updates": 2}),
        (Regression, {"max_updates": 5}),
    ],
)
def test_the_last_record_is_there_without_listeners(task: Any, options: Any) -> None:
    heard = Trainer(micro_batch_size=2, accumulate_grad_batches=3, callbacks=Callback(), **options)
    alone = Trainer(micro_batch_size=2, accumulate_grad_batches=3, **options)
    for trainer in (heard, alone):
        trainer.fit(task(22))
        assert trainer.record.pop("samples_per_second") > 0
    assert alone.record == heard.record
    assert alone.metrics == heard.metrics


def test_progress_shows_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    class Logs(Validated):
        def loss(self, model: Any, batch: Any) -> Any:
            self.log("first", batch[0][0, 0].sign() * 0 + 0.25)
            self.log("other", 2.0)
            return super().loss(model, batch)

    Trainer(micro_batch_size=4, max_updates=3, callbacks=Progress(0, metrics=["first", "missing"])).fit(Logs(22))
    lines = [line for line in capsys.readouterr().out.splitlines() if "grad norm" in line]
    assert len(lines) == 3
    assert all("  first 0.25  grad norm" in line and "other" not in line for line in lines)
