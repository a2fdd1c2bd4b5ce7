"""Killed and continued is uninterrupted: to the bit on as many processes, to 1e-12 on others, each sample once."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from processes import ChildError, run
from reference import Regression, Samples, big_batch_run, data, in_order, parameters
from torch import Tensor, nn

from engine import Callback, GradientAccumulationScheduler, Loss, Task, Trainer
from strategies import DDPStrategy

SAMPLES, N = 23, 2
SCHEDULING = {0: 3, 1: 1, 2: 2}


class Full(Task):
    """Everything that a checkpoint must know of: late weights, dropout, a schedule of the learning rate, validation."""

    def __init__(self, normalises: bool = True, adaptive: bool = True, streams: Any = None) -> None:
        self.x, self.y = data(SAMPLES)
        self.weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.normalises, self.adaptive, self.streams = normalises, adaptive, streams
        self.seen: list[int] = []

    def configure_model(self) -> nn.Module:
        norm = nn.BatchNorm1d(8) if self.normalises else nn.Identity()
        return nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)).double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        if not self.adaptive:
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        total = (self.total_updates or 20) + 1
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total)

    def train_data(self) -> Any:
        return Samples(self.x, self.y) if self.streams is None else self.streams

    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y, index = batch
        self.seen += index.tolist()
        weights = self.weights[index]
        x = torch.cat([x, x.mean(0, keepdim=True)])  # BatchNorm wants two
        errors = (model(x)[:-1] - y)[:, 0] ** 2
        return Loss((errors * weights).sum(), weights.sum())


class Witness(Callback):
    """Writes which samples each update saw, and has a state of its own."""

    def __init__(self, folder: str, stops_at: int | None = None) -> None:
        self.folder, self.stops_at, self.sum = Path(folder), stops_at, 0.0

    def on_fit_start(self, trainer: Any) -> None:
        trainer.task.seen.clear()
        self.file = (self.folder.parent / f"seen-{trainer.strategy.rank}").open("a", buffering=1)

    def on_update_end(self, trainer: Any) -> None:
        self.file.write(json.dumps([trainer.update, trainer.epoch, trainer.task.seen]) + "\n")
        trainer.task.seen.clear()
        self.sum += trainer.record["loss"]
        if trainer.update == self.stops_at and trainer.strategy.rank == trainer.strategy.data_parallel_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"]


class Dies(DDPStrategy):
    """Is killed as one process, at the first time of a named moment from the n-th window of this start on."""

    def __init__(self, kill: tuple[int, int, str] | None) -> None:
        super().__init__(timeout_seconds=20, bucket_cap_mb=1e-4)
        self._kill, self._window = kill, -1

    def at(self, moment: str) -> None:
        rank, window, killing = self._kill or (-1, 0, "")
        if moment == killing and rank == self.rank and window <= self._window:
            os.kill(os.getpid(), signal.SIGKILL)

    def run_window(self, window: Any, forward: Any) -> None:
        self._window += 1

        def watched(micro: Any) -> Any:
            self.at("forward")
            return forward(micro)

        super().run_window(window, watched)
        self.at("after reduce")

    def backward(self, loss: Tensor, scale: Any) -> None:
        if self._ddp.require_backward_grad_sync:
            self.at("before reduce")
            first = next(self._model.parameters())  # its gradient comes last: other buckets are under way
            first.register_hook(lambda gradient: self.at("in reduce"))
        super().backward(loss, scale)

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        norm = super().clip(max_norm, factor)
        self.at("before step")
        return norm

    def clear_gradients(self) -> None:
        self.at("after step")
        super().clear_gradients()
        self.at("boundary")

    def fingerprint(self) -> int:
        self.at("before save")
        return super().fingerprint()

    def gather(self, value: Any) -> list[Any]:
        self.at("gather")
        return super().gather(value)

    def state_dict(self, optimizer: Any = None) -> dict[str, Any]:
        self.at("in save")
        return super().state_dict(optimizer)

    def synchronize_buffers(self, model: nn.Module) -> None:
        self.at("validation")
        super().synchronize_buffers(model)


MOMENTS = [
    "forward",
    "before reduce",
    "in reduce",
    "after reduce",
    "before step",
    "after step",
    "boundary",
    "gather",
    "validation",
    "in save",  # on process 0, which alone does it
    "before save",  # on each of several, which compare their replicas
]
KILLS = [
    (P, moment) if P == 3 else pytest.param(P, moment, marks=pytest.mark.slow)
    for P in (1, 2, 3)
    for moment in MOMENTS
    if (P, moment) != (1, "before save")
]


def fit(folder: str, kill: Any = None, stops_at: int | None = None, task: Any = None, strategy: Any = None) -> Any:
    witness = Witness(folder, stops_at)
    trainer = Trainer(
        strategy or Dies(kill),
        micro_batch_size=N,
        max_epochs=3,
        gradient_clip_norm=0.5,
        save_every_n_updates=2,
        validate_every_n_updates=3,
        callbacks=[GradientAccumulationScheduler(SCHEDULING), witness],
        run_dir=folder,
    )
    states: list[Any] = []
    keeps = Callback()
    keeps.on_fit_end = lambda trainer: states.append(trainer.strategy.state_dict(trainer.optimizer))  # type: ignore[method-assign]
    trainer.callbacks.append(keeps)
    trainer.fit(task or Full())
    return trainer.interrupted_by, trainer.update, states, witness.sum


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if name != "samples_per_second"} for r in records]


def check_samples(folder: Path, P: int) -> None:
    """Of each update the last attempt counts; in each epoch every sample is seen once."""
    counts: dict[int, Counter[int]] = {}
    for rank in range(P):
        lines = [json.loads(line) for line in (folder.parent / f"seen-{rank}").read_text().splitlines()]
        for epoch, seen in {update: (epoch, seen) for update, epoch, seen in lines}.values():
            counts.setdefault(epoch, Counter()).update(seen)
    assert counts == {epoch: Counter(range(SAMPLES)) for epoch in range(3)}


@cache
def uninterrupted(P: int) -> Any:
    with TemporaryDirectory() as parent:
        results = run(P, fit, f"{parent}/run")
        return results, history(Path(parent, "run"))


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize(("P", "moment"), KILLS)
def test_killed_twice_and_continued_is_uninterrupted_to_the_bit(P: int, moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for window, rank in ((2, 0), (3, 0 if moment == "in save" else P - 1)):
        with pytest.raises(ChildError) as raised:
            run(P, fit, str(folder), (rank, window, moment), seconds=30)
        assert raised.value.errors[rank] == "died with exit code -9"
    results = run(P, fit, str(folder), seconds=30)
    expected, expected_history = uninterrupted(P)
    for found, reference in zip(results, expected, strict=True):
        assert same(found, reference)
    assert history(folder) == expected_history
    check_samples(folder, P)


def plain(P_before: int, P_after: int, folder: str, stops_at: int | None) -> Any:
    """A run without BatchNorm and Adam, whose results are comparable between different P."""
    task = Full(normalises=False, adaptive=False)
    strategy: Any = "single" if not torch.distributed.is_initialized() else "ddp"
    return fit(folder, stops_at=stops_at, task=task, strategy=strategy)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (2, 1), (1, 4), (3, 0)])
def test_a_run_goes_on_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """The effective batch of each stage stays; 0 is one process without a group, on the single-device strategy."""
    folders = [tmp_path / name / "run" for name in ("whole", "parts")]
    for folder in folders:
        folder.parent.mkdir()
    whole = run(before, plain, before, before, str(folders[0]), None)[0]
    for stops_at in (2, 5):
        stopped = run(before, plain, before, before, str(folders[1]), stops_at)
        assert [(signal_, update) for signal_, update, *_ in stopped][-1] == ("SIGTERM", stops_at)
    parts = run(max(after, 1), plain, before, after, str(folders[1]), None, group=after > 0)[0]
    for name, value in whole[2][0]["model"].items():
        torch.testing.assert_close(parts[2][0]["model"][name], value, rtol=0, atol=1e-12)
    expected, found = history(folders[0]), history(folders[1])
    for one, other in zip(expected, found, strict=True):
        one.pop("accumulate_grad_batches", None), other.pop("accumulate_grad_batches", None)
        assert one == pytest.approx(other, rel=1e-9)
    check_samples(folders[1], max(before, after))


class Stream:
    """This process's micro-batches, reshuffled each epoch; with a state if it is told to have one."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch, self.start, self.reads = length, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        x, y = data(SAMPLES)
        generator = torch.Generator().manual_seed(10 * self.length + self.epoch)  # another order on each process
        rows = torch.randperm(SAMPLES, generator=generator)[: 2 * self.length].split(2)
        start, self.start = self.start, 0
        for self.place in range(start, len(rows)):
            self.reads += 1
            yield x[rows[self.place]], y[rows[self.place]], rows[self.place]


class StatefulStream(Stream):
    place = -1

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.place + 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.place = state["next"], state["next"] - 1

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.place = -1


def fit_stream(folder: str, kind: type[Stream], stops_at: int | None) -> Any:
    stream = kind([7, 4][torch.distributed.get_rank()])
    result = fit(folder, stops_at=stops_at, task=Full(streams=stream))
    return result, stream.reads


@pytest.mark.parametrize("kind", [Stream, StatefulStream])
@pytest.mark.parametrize("stops_at", [1, pytest.param(2, marks=pytest.mark.slow), 3, 5])
def test_streams_go_on_where_they_were(kind: type[Stream], stops_at: int, tmp_path: Path) -> None:
    whole = run(2, fit_stream, str(tmp_path / "whole" / "run"), kind, None)
    parts_folder = str(tmp_path / "parts" / "run")
    stopped = run(2, fit_stream, parts_folder, kind, stops_at)
    assert {update for (_, update, *_), _ in stopped} == {stops_at}
    parts = run(2, fit_stream, parts_folder, kind, None)
    for rank in range(2):
        (_, _, found, total), reads = parts[rank]
        (_, _, expected, expected_total), all_reads = whole[rank]
        assert same(found, expected)
        assert total == expected_total
        if kind is StatefulStream and rank == 0:  # nothing is read again
            assert reads == all_reads - {1: 3, 2: 6, 3: 7, 5: 9}[stops_at]
    assert history(tmp_path / "whole" / "run") == history(tmp_path / "parts" / "run")


class Counting(nn.Module):
    """Forward reads a buffer that it changes, as spectral norm does: processes differ by it within a window."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1).double()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * x.abs().mean())
        return self.linear(x) / self.scale


class Counts(Full):
    def configure_model(self) -> nn.Module:
        return Counting()


def fit_counting(folder: str, stops_at: int | None) -> Any:
    return fit(folder, stops_at=stops_at, task=Counts())


def test_buffers_that_forward_reads_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run(2, fit_counting, str(tmp_path / "run"), 10)  # no validation has made them alike since
    found = run(2, fit_counting, str(tmp_path / "run"), None)
    assert same(found, run(2, fit_counting, str(tmp_path / "whole" / "run"), None))


def fit_with(K: int, run_dir: str, epochs: int) -> Any:
    trainer = Trainer(micro_batch_size=2, accumulate_grad_batches=K, max_epochs=epochs, run_dir=run_dir, shuffle=False)
    trainer.fit(Regression(48))
    return trainer.update, parameters(trainer.model)


@pytest.mark.parametrize("K", [6, 3])
def test_a_window_of_the_same_samples_is_the_same_run(K: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(2, fit_with, 3, str(tmp_path), 1)
    update, found = fit_with(K, str(tmp_path), 2)
    assert update == 8
    reference = big_batch_run(Regression(48), [in_order(48, 12)] * 2)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
    told = "the effective batch stays that of the checkpoint: K is 6 on these processes, not 3."
    assert (told in caplog.messages) == (K == 3)


def test_a_window_of_other_samples_is_another_run(tmp_path: Path) -> None:
    run(2, fit_with, 3, str(tmp_path), 1)
    with pytest.raises(ValueError, match="accumulate_grad_batches was 3 and is 4"):
        fit_with(4, str(tmp_path), 2)
