"""Runs on another device than the CPU: one made of Python, or a GPU.

With TALLY_TEST_DEVICE=cuda these tests run there, and with them those that only a GPU can run.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Trainer
from engine.callbacks import EMA
from strategies import DPStrategy, SingleDeviceStrategy, find
from tests.kit.device import DEVICE, Looks, Unseen, there
from tests.kit.killed import same
from tests.kit.processes import ChildError
from tests.kit.reference import Regression, Samples, Watch, big_batch_run, data, in_order, mlp, parameters
from tests.kit.streams import Streamed, deal, windows_of
from tests.kit.tokens import Sequences, big_batch
from tests.kit.windows import Clip

N, EPOCHS = 2, 2
SMALL = 2.0**-6
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STREAMS = deal([12], [3, 1, 2])


def fit(task: Any, strategy: Any = None, device: str = DEVICE, **settings: Any) -> Any:
    trainer = Trainer(
        strategy or SingleDeviceStrategy(device),
        **{"micro_batch_size": N, "max_epochs": EPOCHS, "shuffle": False, **settings},
    )
    trainer.fit(task)
    assert {p.device.type for p in trainer.model.parameters()} == {device}
    return trainer


def fitted(*cases: tuple[Any, dict[str, Any]]) -> list[Tensor]:
    """Return the parameters that each task's run with these settings ends with."""
    return [parameters(fit(task, **settings).model).cpu() for task, settings in cases]


@pytest.mark.parametrize("K", [pytest.param(1, marks=pytest.mark.slow), 2, 7])
def test_updates_equal_one_big_batch(K: int) -> None:
    cases = [(28, None), (27, 0.5), (29, 0.5)]
    settings = [{"accumulate_grad_batches": K, "gradient_clip_norm": max_norm} for _, max_norm in cases]
    found = there(fitted, *zip([Regression(samples) for samples, _ in cases], settings, strict=True))
    for (samples, max_norm), parameters_found in zip(cases, found, strict=True):
        expected = big_batch_run(Regression(samples), [in_order(samples, N * K)] * EPOCHS, max_norm=max_norm)
        torch.testing.assert_close(parameters_found, expected, rtol=0, atol=1e-12)


def test_streams_equal_one_big_batch() -> None:
    task = Streamed(24, STREAMS)
    (found,) = there(fitted, (task, {"accumulate_grad_batches": 2}))
    expected = big_batch_run(task, [windows_of(STREAMS, 2)] * EPOCHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_tokens_whose_weights_are_on_the_device_equal_one_big_batch() -> None:
    task = Sequences(23, masked=range(4, 12))
    expected, _ = big_batch(task, in_order(23, 4), EPOCHS, 0.5)
    (found,) = there(fitted, (task, {"accumulate_grad_batches": 2, "gradient_clip_norm": 0.5}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def looks(K: int, task: Any, **settings: Any) -> list[int]:
    watch = Looks()
    fit(task, accumulate_grad_batches=K, max_epochs=None, max_updates=4, callbacks=watch, **settings)
    return watch.looks[1:]  # before the first, the model is moved


class Logging(Unseen):
    """Logs means by weights of the host and of the device, after the first update, in which names are agreed on."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        self.log("loss_again", loss)
        self.log("large", loss, (batch[0][:, 0] > 0).sum())
        return loss


def all_looks(settings: dict[str, Any]) -> Any:
    tasks = (Unseen, Sequences, Logging)
    return [[looks(K, task(128), gradient_clip_norm=1.0, **settings) for K in (1, 8)] for task in tasks]


@pytest.mark.parametrize("settings", [{}, {"prefetch_to_device": True}])
def test_the_host_waits_for_the_device_as_often_whatever_K_is(settings: dict[str, Any]) -> None:
    of_samples, of_tokens, of_logging = there(all_looks, settings)
    assert of_samples == [[2] * 3] * 2  # the loss and the norm
    assert of_tokens == [[4] * 3] * 2  # the weight, and whether one was negative
    assert of_logging == [[3] * 3] * 2  # all that is logged, at once


class LooksOfValidations(Looks):
    def on_validation_end(self, trainer: Any) -> None:
        self.looks[-1] = self.count()


def looks_of_validations() -> Any:
    """Of 4 and of 16 micro-batches, whose metric is a mean, or a Loss."""
    found = []
    for task_class in (Unseen, Sequences):
        for samples in (8, 32):
            task, watch = task_class(64), LooksOfValidations()
            task.validation_data = task_class(samples).train_data  # type: ignore[method-assign]
            fit(task, max_epochs=None, max_updates=2, validate_every_n_updates=1, callbacks=watch)
            found.append(watch.looks[-1])
    return found


def test_the_host_waits_for_the_device_once_in_a_validation() -> None:
    assert there(looks_of_validations) == [1] * 4


class Whole(Regression):
    """With buffers, AdamW, a model that draws, and data to validate with."""

    def __init__(self, dropout: float) -> None:
        super().__init__(40)
        self.dropout = dropout

    def configure_model(self) -> nn.Module:
        hidden = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Dropout(self.dropout))
        return nn.Sequential(hidden, nn.Linear(7, 1)).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def validation_data(self) -> Any:
        return Samples(*data(9))


def whole_run(folder: Path, device: str, max_updates: int = 12, dropout: float = 0.0, **settings: Any) -> Any:
    """Return what such a run ends with, and the numbers of its updates."""
    watch = Watch()
    trainer = fit(
        Whole(dropout),
        device=device,
        micro_batch_size=6,  # pairs that are normalised are nearly 1 and -1, and their gradients rounding
        accumulate_grad_batches=3,
        max_epochs=None,
        max_updates=max_updates,
        validate_every_n_updates=4,
        save_every_n_updates=3,
        keep_best="min:loss",
        run_dir=folder,
        callbacks=[watch, EMA(0.9)],
        deterministic=device == "cuda",
        **settings,
    )
    state = trainer.strategy.state_dict(trainer.optimizer)
    numbers = [record[name] for record in watch.records for name in ("loss", "grad_norm", "lr")]
    return [state["model"], state["optimizer"]["state"]], torch.tensor(
        numbers + list(trainer.metrics.values()), dtype=torch.float64
    )


def whole_runs(folder: Path, settings: dict[str, Any]) -> Any:
    return [whole_run(folder / device, device, **settings) for device in (DEVICE, "cpu")]


def interrupted(folder: Path, first: str, then: str, dropout: float) -> Any:
    whole_run(folder, first, max_updates=7, dropout=dropout)
    return whole_run(folder, then, dropout=dropout)[0]


def continued(folder: Path) -> Any:
    """Return (interrupted, uninterrupted), then the same of runs that change devices, and that of the CPU."""
    return (
        (interrupted(folder / "0", DEVICE, DEVICE, 0.2), whole_run(folder / "1", DEVICE, dropout=0.2)[0]),
        interrupted(folder / "2", DEVICE, "cpu", 0.0),
        interrupted(folder / "3", "cpu", DEVICE, 0.0),
        whole_run(folder / "4", "cpu")[0],
    )


@pytest.mark.parametrize("settings", [{}, {"prefetch_to_device": True}, {"gradient_clip_norm": 0.5}])
def test_a_run_with_all_that_belongs_to_it_is_that_of_the_CPU(tmp_path: Path, settings: dict[str, Any]) -> None:
    (found, numbers), (expected, numbers_expected) = there(whole_runs, tmp_path, settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(numbers, numbers_expected, rtol=1e-12, atol=1e-12)
    assert len(numbers) > 36


def test_a_run_goes_on_to_the_bit_and_on_another_device_too(tmp_path: Path) -> None:
    (killed, uninterrupted), to_cpu, to_device, expected = there(continued, tmp_path)
    assert same(killed, uninterrupted)
    torch.testing.assert_close(to_cpu, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_device, expected, rtol=0, atol=1e-12)


class Narrow(Regression):
    """In float32, with losses that fp16's first scale leaves finite."""

    def __init__(self) -> None:
        super().__init__(28, lr=0.1 / SMALL, model=lambda: mlp().float())
        self.x, self.y = self.x.float(), self.y.float()
        self.dtypes: set[torch.dtype] = set()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        self.dtypes.add(output.dtype)
        return SMALL * nn.functional.mse_loss(output.float(), batch[1])


def plainly(precision: str) -> Tensor:
    """The same micro-batches in plain torch, on the device and in its autocast; no loss scale."""
    torch.manual_seed(0)
    task = Narrow()
    model = task.model().to(DEVICE)
    optimizer = task.configure_optimizer(model)
    for window in in_order(28, 2 * N) * EPOCHS:
        optimizer.zero_grad()
        for rows in in_order(len(window), N):
            batch = [
                tensor[window.start + rows.start : window.start + rows.stop].to(DEVICE) for tensor in (task.x, task.y)
            ]
            with torch.autocast(DEVICE, DTYPES[precision]):
                loss = task.loss(model, batch)
            (loss * len(rows) / len(window)).backward()
        optimizer.step()
    return parameters(model).cpu()


def with_and_without_engine(precision: str) -> Any:
    task = Narrow()
    found = fit(task, precision=precision, accumulate_grad_batches=2)
    return parameters(found.model).cpu(), task.dtypes, plainly(precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_precision_is_the_autocast_of_the_device(precision: str) -> None:
    found, dtypes, expected = there(with_and_without_engine, precision)
    assert dtypes == {DTYPES[precision]}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def mix() -> None:
    nn.Linear(5, 1).to("fake")(torch.ones(2, 5))


def come_late() -> Any:
    from tests.kit import fake_device

    stream = fake_device.Stream()
    with torch.fake.stream(stream):  # type: ignore[attr-defined]
        batch = torch.ones(3).to("fake", non_blocking=True)
    arrival = stream.record_event()
    before = batch.cpu().tolist()
    arrival()
    return before, batch.cpu().tolist(), len(fake_device.waits)


@pytest.mark.skipif(DEVICE != "fake", reason="of the device made of Python")
def test_the_device_made_of_python_is_one() -> None:
    with pytest.raises(ChildError, match="is on the host, others on the device"):
        there(mix)
    assert there(come_late) == ([-1.0] * 3, [1.0] * 3, 2)


def on_one_gpu(name: str, K: int) -> list[Tensor]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    found = []
    for samples in (28, 27, 29):
        strategy: Any = DPStrategy(devices=1, device_type="cuda") if name == "dp" else find(name)(device="cuda")
        trainer = fit(Regression(samples), strategy, accumulate_grad_batches=K, gradient_clip_norm=0.5)
        weights = trainer.strategy.state_dict()["model"].values()
        found.append(torch.cat([weight.cpu().flatten() for weight in weights]))
    return found


@pytest.mark.skipif(DEVICE != "cuda", reason="a GPU has not been asked for")
@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("strategy", ["dp", "ddp", "fsdp"])
def test_other_strategies_on_one_gpu_equal_one_big_batch(strategy: str, K: int) -> None:
    for samples, found in zip((28, 27, 29), there(on_one_gpu, strategy, K), strict=True):
        expected = big_batch_run(Regression(samples), [in_order(samples, N * K)] * EPOCHS, max_norm=0.5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Adaptive(Regression):
    def __init__(self, fused: bool) -> None:
        super().__init__(28)
        self.fused = fused

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=self.fused)


@pytest.mark.skipif(DEVICE != "cuda", reason="a GPU has not been asked for")
def test_a_fused_step_on_a_gpu_is_a_plain_one() -> None:
    settings = {"accumulate_grad_batches": 2, "gradient_clip_norm": 0.5}
    fused, plain = there(fitted, *((Adaptive(fused), settings) for fused in (True, False)))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)


class OnHost(Clip):
    """Looks which micro-batches are still on the device when the loss of the window is computed."""

    keeps_batches_on_host = True

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        self.batches = [*getattr(self, "batches", []), weakref.ref(batch[0])]
        assert batch[0].device.type == DEVICE
        return super().outputs(model, batch)

    def window_loss(self, outputs: Any) -> Tensor:
        self.alive = [reference() is not None for reference in self.batches]
        self.batches = []
        return super().window_loss(outputs)


def on_host() -> Any:
    found = [parameters(fit(task, accumulate_grad_batches=3, max_updates=2).model).cpu() for task in (Clip(), OnHost())]
    task = OnHost()
    fit(task, accumulate_grad_batches=3, max_updates=1)
    return found, task.alive


def test_a_window_that_runs_twice_may_wait_on_the_host() -> None:
    (there_kept, on_host_kept), alive = there(on_host)
    assert torch.equal(there_kept, on_host_kept)
    assert alive == [False, False, True]
