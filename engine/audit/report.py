"""Runs an audit, and writes what it found as a table, Markdown or JSON."""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import TemporaryDirectory
from threading import BrokenBarrierError
from typing import NamedTuple

import torch

from engine.audit.cases import CASES, UNEVEN, Adapter, Case, Job
from engine.audit.classify import EXACT, LIMITS, UNNAMED, Found, judge
from engine.audit.recorder import Step, recorded
from engine.conformance.processes import ProcessesFailedError, run
from engine.errors import UserError
from strategies import resolve
from strategies.environment import started_rank

LOST = "another process has gone"
HEAD = ("case", "verdict", "relative error", "ranks' difference", "collectives", "bytes reduced", "seconds")


class Report(NamedTuple):
    """The findings of an audit, case by case. Collectives and bytes are those of the last update on process 0."""

    rows: list[Found]

    @property
    def exact(self) -> bool:
        """Whether each case is exact."""
        return all(row.verdict == EXACT for row in self.rows)

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict by case."""
        return {row.case: row.verdict for row in self.rows}

    def text(self) -> str:
        """Return an aligned table, and what is known beside it."""
        rows = [list(HEAD), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{row.case}: {row.detail}" for row in self.rows if row.detail)])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [list(HEAD), ["---"] * len(HEAD), *map(_cells, self.rows)]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(row: Found) -> list[str]:
    error, apart = ("-" if math.isnan(value) else f"{value:.1e}" for value in (row.error, row.difference))
    return [row.case, row.verdict, error, apart, f"{row.collectives}", f"{row.reduced_bytes}", f"{row.seconds:.1f}"]


def audit(
    adapter: Adapter | Callable[[Job], object],
    processes: int = 2,
    cases: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float64,
    seconds: float = 60.0,
) -> Report:
    """Run the cases on real processes, and compare the gradient of each `optimizer.step` with that of one big batch.

    Each run of a case has `seconds`. `cases` are the adapter's if None; one process leaves out "uneven processes".
    Raises UserError for other than 1 to 4 processes, an unknown case, or a dtype but float64 and float32.
    """
    adapter = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    names = adapter.cases if cases is None else cases
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"cases={unknown[0]!r}: expected some of {', '.join(CASES)}.")
    for name, value, known in (("processes", processes, (1, 2, 3, 4)), ("dtype", dtype, tuple(LIMITS))):
        if value not in known:
            raise UserError(f"{name}={value}: expected one of {', '.join(map(str, known))}.")
    chosen = [Case(name, processes, dtype) for name in names if processes > 1 or name != UNEVEN]
    return Report([_found(adapter, case, dtype, seconds) for case in chosen])


def _found(adapter: Adapter, case: Case, dtype: torch.dtype, seconds: float) -> Found:
    start, both = time.monotonic(), (False, True) if case.then_P else (False,)
    try:
        with TemporaryDirectory() as folder:
            runs = [_run(adapter, case, resumes, dtype, seconds, folder) for resumes in both]
        found = judge(case, [[own for own, _ in one] for one in runs], runs[0][0][1], adapter.make, dtype)
    except ProcessesFailedError as error:
        lost = "did not end", f"RuntimeError: {LOST}"
        own = {rank: text for rank, text in error.errors.items() if not text.startswith(lost)}
        verdict = "hang" if not own else "crash on one process" if len(own) == 1 < case.P else UNNAMED
        found = Found(verdict, detail=str(ProcessesFailedError(own) if own else error))
    found.case, found.seconds = case.name, time.monotonic() - start
    return found


def _run(
    adapter: Adapter, case: Case, resumes: bool, dtype: torch.dtype, seconds: float, folder: str
) -> list[tuple[list[Step], bool]]:
    """Train; return each process's steps, and whether its samples came from the dataset."""
    P = case.then_P if resumes and case.then_P else case.P
    ended = multiprocessing.get_context("fork").Barrier(P)

    def train() -> tuple[list[Step], bool]:
        torch.manual_seed(0)
        job = Job(case, adapter.make().to(dtype), started_rank(), dtype, folder, resumes)
        try:
            with recorded(job.model, case.task.x.to(dtype)) as steps:
                adapter.train(job)
        except Exception as error:
            ended.abort()
            raise (RuntimeError(f"{LOST}: {error}") if resolve("ddp").has_lost_contact(error) else error) from error
        with suppress(BrokenBarrierError):
            ended.wait()  # a process that others wait for does not end before them
        return steps, job.from_dataset

    return run(P, train, seconds=seconds)
