"""Killed and continued is uninterrupted: to the bit on as many processes, to 1e-12 on others, each sample once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from engine import Trainer
from tests.kit.killed import SAMPLES, Counting, Full, check_samples, fit, history, same
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, big_batch_run, data, in_order, parameters

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
    (P, moment) if P == 3 else pytest.param(P, moment, marks=(pytest.mark.slow, pytest.mark.campaign))
    for P in (1, 2, 3)
    for moment in MOMENTS
    if (P, moment) != (1, "before save")
]


@cache
def uninterrupted(P: int) -> Any:
    with TemporaryDirectory() as parent:
        results = run(P, fit, f"{parent}/run")
        return results, history(Path(parent, "run"))


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


class Counts(Full):
    def configure_model(self) -> nn.Module:
        return Counting()


def fit_counting(folder: str, stops_at: int | None) -> Any:
    return fit(folder, stops_at=stops_at, task=Counts())


def test_buffers_that_forward_reads_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run(2, fit_counting, str(tmp_path / "run"), 10)  # no validation has made them alike since
    found = run(2, fit_counting, str(tmp_path / "run"), None)
    assert same(found, run(2, fit_counting, str(tmp_path / "whole" / "run"), None))


def fit_with(K: int, run_dir: str, epochs: int, **more: Any) -> Any:
    options = {"accumulate_grad_batches": K, "max_epochs": epochs, "run_dir": run_dir, **more}
    trainer = Trainer(micro_batch_size=2, shuffle=False, **options)
    trainer.fit(Regression(48))
    return trainer.update, parameters(trainer.model)


@pytest.mark.parametrize("K", [6, 3, 1])
def test_a_window_of_the_same_samples_is_the_same_run(K: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(2, fit_with, 3, str(tmp_path), 1)
    update, found = fit_with(K, str(tmp_path), 2, effective_batch_size=12 if K == 1 else None)
    assert update == 8
    reference = big_batch_run(Regression(48), [in_order(48, 12)] * 2)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
    told = "the effective batch stays that of the checkpoint: K is 6 on these processes, not 3."
    assert (told in caplog.messages) == (K == 3)


def test_a_window_of_other_samples_is_another_run(tmp_path: Path) -> None:
    run(2, fit_with, 3, str(tmp_path), 1)
    was = r"an update was 12 samples \(accumulate_grad_batches=3\) and is 8 samples"
    with pytest.raises(ValueError, match=rf"run: {was} \(accumulate_grad_batches=4\)\. Use a new run_dir"):
        fit_with(4, str(tmp_path), 2)
    with pytest.raises(ValueError, match=rf"run: {was} \(effective_batch_size=8\)\. Use a new run_dir"):
        fit_with(1, str(tmp_path), 2, effective_batch_size=8)
