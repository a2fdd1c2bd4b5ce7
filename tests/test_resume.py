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
from torch import Tensor, nn
from toy import Samples, data

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
KILLS = [(P, moment) for P in (1, 2, 3) for moment in MOMENTS if (P, moment) != (1, "before save")]


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
    return trainer.interrupted, trainer.update, states, witness.sum


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
        generator = torch.Generator().manual_seed(self.epoch)
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
@pytest.mark.parametrize("stops_at", [1, 2, 3, 5])
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


def fit_counting(folder: str, kill: Any) -> Any:
    return fit(folder, kill, task=Counts())


def test_buffers_that_forward_reads_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ChildError):
        run(2, fit_counting, str(tmp_path / "run"), (0, 10, "boundary"), seconds=30)
    found = run(2, fit_counting, str(tmp_path / "run"), None)
    assert same(found, run(2, fit_counting, str(tmp_path / "whole" / "run"), None))


def fit_elsewhere(folder: str | None, options: dict[str, Any]) -> Any:
    task = options.pop("task", None) or Full(normalises=False, adaptive=False)
    trainer = Trainer("single", **{"micro_batch_size": N, "max_epochs": 1, "run_dir": folder, **options})
    trainer.fit(task)
    return trainer


class Wider(Full):
    def configure_model(self) -> nn.Module:
        return nn.Linear(5, 1).double()


class Shorter(Full):
    def train_data(self) -> Any:
        return Samples(self.x[:20], self.y[:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed was 0 and is 3. Start a new run_dir, or allow it with resume_with_changes=True"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches was 1 and is 2"),
        ({"micro_batch_size": 3}, "micro_batch_size was 2 and is 3"),
        ({"task": Shorter(False, False)}, "the number of training samples was 23 and is 20"),
        ({"task": Full(False)}, "the optimizer was SGD and is AdamW"),
        (
            {"task": Wider(), "resume_with_changes": True},
            r"is of another model: 0.bias is torch.float64 \(8,\) there and",
        ),
    ],
    ids=["seed", "K", "N", "data", "optimizer", "model"],
)
def test_a_checkpoint_of_another_run_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "run"), {})
    with pytest.raises(ValueError, match=message):
        fit_elsewhere(str(tmp_path / "run"), {"max_epochs": 2, **options})
    if "resume_with_changes" not in options and "the optimizer" not in message:
        trainer = fit_elsewhere(str(tmp_path / "run"), {"max_epochs": 2, "resume_with_changes": True, **options})
        assert trainer.epoch == 2


def test_a_finished_run_stays_finished_and_can_be_extended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    first = fit_elsewhere(folder, {"max_epochs": 2})
    again = fit_elsewhere(folder, {"max_epochs": 2})
    assert (again.update, again.samples, again.metrics) == (first.update, first.samples, first.metrics)
    longer = fit_elsewhere(folder, {"max_epochs": 3})
    at_once = fit_elsewhere(str(tmp_path / "other"), {"max_epochs": 3})
    assert same(longer.model.state_dict(), at_once.model.state_dict())
    assert history(tmp_path / "run") == history(tmp_path / "other")


def test_resume_never_wants_a_new_folder_and_a_path_is_gone_on_from(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    first = fit_elsewhere(folder, {})
    with pytest.raises(FileExistsError, match="is taken"):
        fit_elsewhere(folder, {"resume": "never"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not a run")
    with pytest.raises(FileExistsError, match="is taken"):
        fit_elsewhere(str(tmp_path / "notes"), {})
    for path in (folder, f"{folder}/checkpoints", str(next(Path(folder).glob("checkpoints/update-*")))):
        second = fit_elsewhere(str(tmp_path / Path(path).name), {"resume": path, "max_epochs": 2})
        assert second.update == 2 * first.update
    with pytest.raises(ValueError, match="resume='nowhere': there is no such checkpoint"):
        fit_elsewhere(folder, {"resume": "nowhere"})


def test_pretrained_weights_start_a_run_and_nothing_else(tmp_path: Path) -> None:
    first = fit_elsewhere(str(tmp_path / "run"), {})
    weights = str(tmp_path / "run" / "model.safetensors")
    second = fit_elsewhere(None, {"weights": weights, "max_epochs": None, "max_updates": 1})
    assert second.update == 1
    before, after = first.model.state_dict(), second.model.state_dict()
    assert all((before[name] - after[name]).abs().max() < 0.1 for name in before)  # one step
    with pytest.raises(ValueError, match=r"weights='no.safetensors': there is no such file"):
        fit_elsewhere(None, {"weights": "no.safetensors"})
    with pytest.raises(ValueError, match="is of another model"):
        fit_elsewhere(None, {"weights": weights, "task": Wider()})


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    first = fit_elsewhere(str(folder), {"save_every_n_updates": 5})
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    again = fit_elsewhere(str(folder), {"save_every_n_updates": 5})
    assert f"{newest} is damaged: model.safetensors does not have the SHA-256" in caplog.text
    assert same(again.model.state_dict(), first.model.state_dict())


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"keep_best": "min:loss", "validate_every_n_updates": 2, "keep_last_checkpoints": 1, "max_epochs": 3}
    fit_elsewhere(str(folder), options)
    losses = {r["update"]: r["validation/loss"] for r in history(folder) if "validation/loss" in r}
    best = (folder / "checkpoints" / "best").read_text().strip()
    assert best == f"update-{min(losses, key=losses.__getitem__):08d}"
    assert len(list((folder / "checkpoints").glob("update-*"))) <= 2
    resumed = fit_elsewhere(str(tmp_path / "on"), {"resume": str(folder / "checkpoints" / best), **options})
    assert resumed.epoch == 3


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("update-*"))


def test_going_back_leaves_what_came_after_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"save_every_n_updates": 3, "keep_last_checkpoints": 2}
    fit_elsewhere(str(folder), options)
    assert names(folder) == ["update-00000009", "update-00000012"]
    back = str(folder / "checkpoints" / "update-00000009")
    fit_elsewhere(str(folder), {"resume": back, "max_epochs": None, "max_updates": 10, **options})
    assert names(folder) == ["update-00000009", "update-00000010"]
    assert len(list((folder / "checkpoints").glob("set-aside-update-00000012-*"))) == 1
    assert [r["update"] for r in history(folder) if "loss" in r] == list(range(1, 11))


def test_where_no_checkpoint_is_whole_nothing_is_started_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit_elsewhere(str(folder), {})
    before = history(folder)
    for name in names(folder):
        (folder / "checkpoints" / name / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* is whole: restore one, or start a new run"):
        fit_elsewhere(str(folder), {})
    assert history(folder) == before


def test_the_same_command_with_a_path_goes_on_with_its_own_run(tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "first"), {})
    options = {"resume": str(tmp_path / "first"), "max_epochs": 3}
    fit_elsewhere(str(tmp_path / "second"), {**options, "max_updates": 20})
    assert fit_elsewhere(str(tmp_path / "second"), options).update == 36
    assert [r["update"] for r in history(tmp_path / "second") if "loss" in r] == list(range(13, 37))


def test_another_optimizer_starts_afresh_where_changes_are_allowed(tmp_path: Path) -> None:
    fit_elsewhere(str(tmp_path / "run"), {})
    options = {"max_epochs": 2, "task": Full(normalises=False), "resume_with_changes": True}
    assert fit_elsewhere(str(tmp_path / "run"), options).update == 24


def test_a_folder_with_another_s_config_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileExistsError, match="is taken"):
        fit_elsewhere(str(tmp_path), {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
