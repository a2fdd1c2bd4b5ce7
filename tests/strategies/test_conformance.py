"""The conformance kit: it is green for our strategies, and each of sixteen defects is red where it should be."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.conformance import Backend, BrokenPromiseError, NotDeclaredError, processes
from engine.conformance.__main__ import main
from engine.conformance.report import CHECKS, run_checks, table
from strategies import DDPStrategy, find
from tests.kit.broken_strategies import DEFECTS, Defect
from tests.kit.commands import python


@cache
def backend(name: str, processes: int, **options: Any) -> Backend:
    return Backend(find(name), options, processes)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_ddp_keeps_every_promise(check: Callable[[Backend], None]) -> None:
    check(backend("ddp", 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "ours",
    [
        pytest.param(backend("single", 1), id="single"),
        pytest.param(backend("dp", 1, devices=3), id="dp3", marks=pytest.mark.campaign),
        pytest.param(backend("ddp", 1), id="ddp1", marks=pytest.mark.campaign),
        pytest.param(backend("ddp", 3, bucket_cap_mb=1e-4), id="ddp3"),
    ],
)
def test_ours_keep_every_promise(ours: Backend) -> None:
    assert red(ours) == []


def red(subject: Backend) -> list[str]:
    """The names of the promises that are broken, in the kit's order."""
    broken = []
    for name, check in CHECKS.items():
        try:
            check(subject)
        except BrokenPromiseError:
            broken.append(name)
        except NotDeclaredError:
            pass
    return broken


def with_defect(defect: Defect) -> Backend:
    return Backend(defect.strategy)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.strategy.__name__)
def test_a_defect_is_red_in_the_right_place_and_says_what_was_seen(defect: Defect) -> None:
    with pytest.raises(BrokenPromiseError) as raised:
        CHECKS[defect.check](with_defect(defect))
    assert defect.says in str(raised.value)


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize(
    ("defect", "check"),
    [(defect, check) for defect in DEFECTS for check in defect.others.split()],
    ids=lambda part: part if isinstance(part, str) else part.strategy.__name__,
)
def test_a_defect_is_red_wherever_it_must(defect: Defect, check: str) -> None:
    with pytest.raises(BrokenPromiseError):
        CHECKS[check](with_defect(defect))


class ReducesOften(DDPStrategy):
    """Says that it reduces at each micro-batch, is exact to three digits, keeps no state, and has a K of its own."""

    defers_reduction = False
    exact_to = None
    resumes_exactly = False
    supports_variable_windows = False
    needs_equal_windows = True


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_reduction", "defers_reduction = False"),
        ("backward", "exact_to = None"),
        ("exact", "exact_to = None"),
        ("change_of_P", "exact_to = None"),
        ("resume", "resumes_exactly = False"),
        ("variable_windows", "supports_variable_windows = False: a schedule is refused"),
        ("uneven_data", "needs_equal_windows"),
    ],
)
def test_what_is_not_declared_is_not_checked(name: str, reason: str) -> None:
    with pytest.raises(NotDeclaredError, match=reason):
        CHECKS[name](Backend(ReducesOften))


def hangs(strategy: Any) -> None:
    if strategy.rank == 1:
        raise OSError("the disk is gone")
    time.sleep(1000)


def test_processes_are_bounded_in_time_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.conformance.processes.GRACE", 0.5)
    with pytest.raises(
        BrokenPromiseError, match=r"process 0: did not end.*in hangs; process 1: OSError: the disk is gone"
    ):
        Backend(DDPStrategy, seconds=60).run(hangs)


class NoProcesses(DDPStrategy):
    data_parallel_size = 0


def test_what_a_check_cannot_bear_is_a_broken_promise_too() -> None:
    text = table([*run_checks(Backend(NoProcesses), ["declared"])])
    assert text.startswith("declared: ZeroDivisionError: ")
    assert text.endswith("1 promises: 0 kept, 1 broken, 0 not declared.")


MINE = """
from strategies import DDPStrategy

class Mine(DDPStrategy):
    supports_variable_windows = False

    def __init__(self, lossy: bool = False) -> None:
        super().__init__()
        self.lossy = lossy

    def clip(self, max_norm, factor=1.0):
        return super().clip(max_norm, factor) * (0.5 if self.lossy else 1)
"""


@pytest.mark.parametrize("lossy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_command_ends_with_a_table_and_its_status_tells(tmp_path: Path, lossy: bool) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    words = ["--only", "clip", "variable", f"--lossy={lossy}".lower()]
    done = python("-m", "engine.conformance", "mine.Mine", "--processes", "2", *words, folder=tmp_path)
    assert done.returncode == int(lossy), done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == f"2 promises: {1 - lossy} kept, {int(lossy)} broken, 1 not declared."
    assert lines[-4].startswith("broken " if lossy else "kept ")
    assert lines[-3].startswith("not declared  variable windows  supports_variable_windows = False")
    if lossy:
        says = "clip: process 0: six windows, clip(None, 1.0) returned the norm"
        assert any(line.startswith(says) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope.Nope"], "could not be imported: No module named 'nope'"),
        (["torch.Tensor"], "<class 'torch.Tensor'> is not a subclass of strategies.Strategy"),
        (["strategies.Strategy"], "does not define accumulation_context, effective_batch, supports_variable_windows"),
        (["ddp", "--bucket_cap", "1"], "DDPStrategy has --find_unused_parameters"),
        (["ddp", "--bucket_cap_mb", "large"], "Expected a <class 'float'>"),
        (["dp", "--devices", "0"], "devices=0: expected a whole number of at least 1"),
        (["ddp", "--processes", "0"], "at least 1"),
        (
            ["single", "--processes", "1", "--only", "nope"],
            "--only=nope: expected a word that is in the name of a check.",
        ),
        (["single"], "single cannot be set up on 2 processes: UserError: strategy='single': expected one process"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m engine.conformance: ")
    assert says in said
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_process_that_forks_has_no_store() -> None:
    """Where it had one, a child forked while the store's thread looked up an address waited for ever for a lock."""
    before = os.listdir("/proc/self/task")
    assert processes._start_store()[0] > 0
    assert os.listdir("/proc/self/task") == before


def test_runs_within_a_run_meet_elsewhere() -> None:
    """Where they did not, a later run of this process found the addresses of theirs, which are gone."""
    ports = {processes.run(1, os.getenv, "MASTER_PORT", seconds=30)[0] for _ in range(2)}
    assert len(ports) == 2
