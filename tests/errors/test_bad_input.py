"""Bad input: one clear message each, early, naming the value and the way out; the command line exits with 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import Callback, GradientAccumulationScheduler, Loss, Trainer
from engine.cli.main import main
from tests.kit.commands import RUN, python
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0: expected a whole number of at least 1. Use 1"),
        ({"accumulate_grad_batches": -3}, "accumulate_grad_batches=-3"),
        ({"accumulate_grad_batches": True}, "accumulate_grad_batches=True: expected a whole number"),
        ({"accumulate_grad_batches": 2.0}, "accumulate_grad_batches=2.0: expected a whole number"),
        ({"accumulate_grad_batches": "2"}, "accumulate_grad_batches='2': expected a whole number"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: expected a whole number of at least 1"),
        ({"effective_batch_size": 0}, "effective_batch_size=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"max_epochs": None}, "max_epochs=None, max_updates=None: expected an end"),
        ({"max_epochs": None, "max_time": 10}, "max_epochs=None, max_updates=None: expected an end"),
        ({"max_time": -1}, "max_time=-1"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm=0.0"),
        ({"precision": "bf17"}, "precision='bf17': expected one of fp32, bf16, fp16"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, r"seed=18446744073709551616: expected a whole number below 2\*\*64"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"shuffle": "false"}, "shuffle='false': expected True or False"),
        ({"tf32": "no"}, "tf32='no': expected True or False"),
        ({"callbacks": Callback}, "callbacks=<class .*>: expected a Callback object"),
        ({"callbacks": [Callback(), True]}, "callbacks=True: expected a Callback"),
        ({"lr_rule": ["linear"]}, r"lr_rule=\['linear'\]: expected one of none, linear, sqrt"),
        ({"keep_best": True, "run_dir": "runs"}, "keep_best=True: expected min:METRIC or max:METRIC"),
        ({"run_dir": 3}, "run_dir=3: expected the path of a folder, or None"),
        ({"resume": False}, "resume=False: no such checkpoint. Give its path, or use 'auto' or 'never'"),
        ({"resume": ""}, "resume='': no such checkpoint"),
        ({"weights": True}, "weights=True: no such file. Give a .safetensors file"),
        ({"strategy": "dpp"}, "strategy='dpp': expected one of auto, single, dp, ddp.*Did you mean 'd"),
        (
            {"accumulate_grad_batches": 2, "effective_batch_size": 64},
            "accumulate_grad_batches=2 and effective_batch_size=64 both set",
        ),
        (
            {"effective_batch_size": 64, "callbacks": GradientAccumulationScheduler({0: 2})},
            "effective_batch_size=64 and GradientAccumulationScheduler",
        ),
        (
            {"accumulate_grad_batches": 2, "callbacks": [Callback(), GradientAccumulationScheduler({0: 2})]},
            "accumulate_grad_batches=2 and GradientAccumulationScheduler",
        ),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2}), GradientAccumulationScheduler({0: 4})]},
            "both set the window length",
        ),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(**{"max_epochs": 1, **options})


def fit(task: Any, **options: Any) -> None:
    Trainer(**{"strategy": "single", "micro_batch_size": 4, "max_epochs": 1, **options}).fit(task)


def test_a_micro_batch_larger_than_the_dataset() -> None:
    with pytest.raises(ValueError, match=r"expected at most the 3 samples of an epoch\. Use 3 or less"):
        fit(Regression(3))


def test_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="no samples"):
        fit(Regression(0))


def task_with(**methods: Any) -> Regression:
    task = Regression(8)
    for name, method in methods.items():
        setattr(task, name, method)
    return task


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"loss": lambda model, b: nn.functional.mse_loss(model(b[0]), b[1]).detach()}, "does not require grad"),
        ({"loss": lambda model, b: (model(b[0]) - b[1]) ** 2}, r"the loss has shape \(4, 1\): expected a 0-dim tensor"),
        ({"loss": lambda model, b: (model(b[0]) - b[1]).mean().bfloat16()}, r"the loss is torch.bfloat16: .*float\(\)"),
        ({"loss": lambda model, b: 3.0}, r"loss\(\) returned float"),
        ({"configure_model": lambda: nn.EmbeddingBag(4, 2, sparse=True)}, "the model has sparse gradients"),
        (
            {"configure_model": lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True))},
            "module '0' has sparse gradients",
        ),
        ({"configure_model": lambda: nn.Linear(5, 1).requires_grad_(False)}, "no parameter that requires grad"),
        ({"configure_model": lambda: torch.zeros(3)}, "returned Tensor: expected a torch.nn.Module"),
        ({"configure_optimizer": lambda model: None}, r"configure_optimizer\(\) returned None"),
        (
            {"configure_optimizer": lambda model: torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))])},
            "a parameter that is not the model's: it would not be reduced",
        ),
        (
            {"train_data": lambda: {"train": Regression(8), "test": None}},
            r"returned a dict with 'train', 'test': expected a dataset of samples\. Return one of its datasets, or",
        ),
        ({"validation_data": lambda: {"x": torch.zeros(8)}}, "returned a dict with 'x': expected a dataset"),
        ({"train_data": lambda: Frame()}, r"len\(dataset\) is 8, but its sample [0-7] raised KeyError: [0-7]"),
        ({"order": lambda epoch: {0, 1, 2, 3}}, r"order\(\) returned a set: expected a sequence of indices\. Use list"),
        ({"order": lambda epoch: iter(range(8))}, r"order\(\) returned a range_iterator: expected a sequence"),
        (
            {"order": lambda epoch: [*range(8)] if epoch == 0 else dict.fromkeys(range(8))},
            r"order\(\) returned a dict: expected a sequence",
        ),
        (
            {"configure_model": lambda: nn.Linear(5, 1, device="meta")},
            r"weight is on the meta device, without values: expected a model on the CPU\. Use to_empty\(device='cpu'\)",
        ),
        ({"configure_optimizer": lambda model: NeedsClosure(model.parameters())}, "NeedsClosure needs a closure"),
        ({"configure_optimizer": lambda model: TwoSteps(model.parameters())}, "TwoSteps needs a closure, and so"),
        ({"train_data": lambda: 3}, r"train_data\(\) or .* returned int: return a map-style dataset"),
        ({"validation_data": list}, r"validation_data\(\) has no samples: expected at least one\. Return None to"),
        (
            {"train_data": lambda: Lies(*Regression(8).train_data().tensors)},
            r"len\(dataset\) is 9, but its sample 8 raised IndexError",
        ),
    ],
)
def test_a_task_that_cannot_be_trained(methods: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(task_with(**methods), max_epochs=2)


@pytest.mark.parametrize("found", [torch.tensor(0.0), torch.tensor(1.0), [], [1.0]])
def test_an_evaluation_that_names_no_metrics(found: Any) -> None:
    task = task_with(validation_data=lambda: Regression(8).train_data(), evaluate=lambda model, batch: found)
    with pytest.raises(ValueError, match=rf"evaluate\(\) returned a {type(found).__name__}: expected a dictionary"):
        fit(task)


def test_keeping_the_best_without_validation_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_best='min:loss': expected validation data\."):
        fit(Regression(8), keep_best="min:loss", run_dir=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_the_first_recipe_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["--plan"]) == 2
    assert "the digits recipe needs scikit-learn: pip install 'tally-engine[recipes]'." in capsys.readouterr().err


@pytest.mark.parametrize("task", [Regression, 3])
@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_what_is_not_a_task(method: str, task: Any) -> None:
    with pytest.raises(ValueError, match=r"task=.*: expected an object of a class that derives from Task\."):
        getattr(Trainer(max_epochs=1), method)(task)


class EndsItself(Regression):
    """Its dataset reads an iterator, which is exhausted before sample 5."""

    def train_data(self) -> Any:
        rows = iter([self.x[0]] * 5)

        class Rows:
            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> Any:
                return next(rows), self.y[0], index

        Rows.y = self.y  # type: ignore[attr-defined]
        return Rows()


@pytest.mark.parametrize("spread", [False, True])
def test_a_dataset_that_ends_itself_loses_no_samples(spread: bool) -> None:
    with pytest.raises(ValueError, match=r"len\(dataset\) is 8, but its sample 5 raised StopIteration: raise another"):
        fit(EndsItself(8), micro_batch_size=4, shuffle=False, spread_windows=spread)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class TwoSteps(torch.optim.SGD):
    """As optimizers that look around (SAM) are written."""

    def first_step(self) -> None: ...


class Frame:
    """As a table of columns: samples are not found by their positions."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, column: Any) -> Any:
        raise KeyError(column)


class Late(Regression):
    """Its third micro-batch has another kind of loss than the first two."""

    def __init__(self, late: Callable[[Tensor], Tensor]) -> None:
        super().__init__(16)
        self.late, self.calls = late, 0

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        losses = (model(batch[0]) - batch[1]).square()
        return self.late(losses) if self.calls == 3 else losses.mean()


@pytest.mark.parametrize(
    ("late", "message"),
    [(lambda losses: losses[:, 0], r"shape \(4,\): expected a 0-dim"), (lambda losses: losses.mean().detach(), "grad")],
)
def test_the_loss_of_every_micro_batch_is_checked(late: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(micro_batch_size=4, accumulate_grad_batches=4, max_epochs=1).fit(Late(late))


class Lies(TensorDataset):
    def __len__(self) -> int:
        return super().__len__() + 1


class SparseLater(nn.Module):
    """Sparse gradients that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 1, dtype=torch.float64))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(index, self.table, sparse=True)


def test_sparse_gradients_that_nothing_announced() -> None:
    task = task_with(
        configure_model=SparseLater, loss=lambda model, batch: nn.functional.mse_loss(model(batch[2]), batch[1])
    )
    with pytest.raises(ValueError, match=r"parameter 'table' has a sparse gradient.*Use sparse=False"):
        fit(task)


def test_validating_without_validation_data() -> None:
    with pytest.raises(ValueError, match=r"Regression.validation_data\(\) returned None"):
        Trainer(max_epochs=1).validate(Regression(8))


def test_a_run_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(FileExistsError, match="expected a folder that nothing else is in"):
        fit(Regression(8), run_dir=str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed", "seed is 0 on process 0, 1 on process 1"),
        ("K", "accumulate_grad_batches is 1 on process 0, 2 on process 1"),
        ("data", "the number of training samples is 8 on process 0, 9 on process 1"),
        ("order", r"the beginning of order\(0\) is \[0, 0, 0, 0\] on process 0, \[1, 1, 1, 1\] on process 1"),
        ("model", r"the shape of weight is \(1, 5\) on process 0, \(2, 5\) on process 1; .*Give all of them the same"),
    ],
)
def test_processes_with_different_configurations(name: str, message: str) -> None:
    def fit_differently() -> None:
        rank = int(os.environ["RANK"])
        options = {"seed": {"seed": rank}, "K": {"accumulate_grad_batches": 1 + rank}}.get(name, {})
        model = (lambda: nn.Linear(5, 1 + rank).double()) if name == "model" else nn.Linear(5, 1).double
        task = Regression(8 + rank if name == "data" else 8)
        if name == "model":
            task.model = model
        if name == "order":
            task.order = lambda epoch: [rank] * 4  # type: ignore[method-assign]
        fit(task, strategy="ddp", **options)

    with pytest.raises(ChildError, match=message) as raised:
        run(2, fit_differently, seconds=20)
    assert len(raised.value.errors) == 2


@pytest.mark.parametrize("where", ["before forward", "after forward"])
def test_a_task_that_fails_on_one_process_stops_all_and_names_it(where: str) -> None:
    def fit_failing_on_one() -> None:
        rank = int(os.environ["RANK"])
        task = Regression(24)
        calls = [0]

        def loss(model: nn.Module, batch: Any) -> Any:
            calls[0] += 1
            if where == "after forward":
                model(batch[0])
            if rank == 1 and calls[0] == 2:  # the last of its window, which reduces
                raise ZeroDivisionError("of the task")
            return nn.functional.mse_loss(model(batch[0]), batch[1])

        task.loss = loss  # type: ignore[method-assign]
        fit(task, strategy="ddp", accumulate_grad_batches=2)

    with pytest.raises(ChildError) as raised:
        run(2, fit_failing_on_one, seconds=20)
    assert raised.value.errors[1] == "ZeroDivisionError: of the task"
    assert "process 1 failed in update 0: ZeroDivisionError: of the task" in raised.value.errors[0]


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--trainer.accumulate_grad_batches=0",),
            "accumulate_grad_batches=0: expected a whole number of at least 1.",
        ),
        (("--trainer.accumulate_grad_batches=true",), "--trainer.accumulate_grad_batches: expected int, got True"),
        (("--trainer.accumulate=3",), "Did you mean --trainer.accumulate_grad_batches?"),
        (("--task=nope.Nope",), "No module named 'nope'. Name a class as module.Class"),
        (("--task=engine.Nope",), "module 'engine' has no attribute 'Nope'"),
        (("--task=launch.recipes.digits.Digits",), "max_epochs=None, max_updates=None"),
        (("--trainer.strategy=ddpp",), "Did you mean 'ddp'?"),
        (("--trainer.strategy=nope.Nope",), "No module named 'nope'"),
        (("--config=nope.toml",), "nope.toml"),
        (("--trainer.micro_batch_size=2000",), "micro_batch_size=2000: expected at most the 1437 samples of an epoch"),
    ],
)
def test_the_command_line_says_one_thing_and_exits_with_2(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = python(RUN, *options, "--trainer.run_dir=run", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def print_config(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUN, "--print_config"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(path)},
        check=False,
    )


def test_another_package_called_engine_does_not_hide_ours(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise RuntimeError('not this one')")
    done = print_config(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_engine_that_was_imported_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import engine")
    done = print_config(tmp_path)
    assert done.returncode != 0
    assert "another package called 'engine' hides ours" in done.stderr
    assert str(tmp_path) in done.stderr


class RaisesToo(Callback):
    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        raise RuntimeError("of the callback")


class Hears(Callback):
    heard: BaseException | None = None

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        self.heard = exception


def test_a_callback_that_raises_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    hears = Hears()
    with pytest.raises(ValueError, match=r"loss\(\) returned float"):
        fit(task_with(loss=lambda model, batch: 3.0), callbacks=[RaisesToo(), hears])
    assert isinstance(hears.heard, ValueError)
    assert "RaisesToo.on_exception raised an error" in caplog.text
    assert "of the callback" in caplog.text


@pytest.mark.parametrize("weight", [numpy.bool_(True), numpy.float32(1), numpy.int64(1), True])
def test_numpy_numbers_are_weights(weight: Any) -> None:
    task = task_with(loss=lambda model, batch: Loss(model(batch[0]).sum(), weight))
    task.validation_data = task.train_data  # type: ignore[method-assign]
    trainer = Trainer("single", micro_batch_size=4, max_epochs=1)
    trainer.fit(task)
    assert trainer.weight == 2.0
