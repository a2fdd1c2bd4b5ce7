"""Runs an audit, and writes what it found as a table, Markdown or JSON."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from threading import BrokenBarrierError
from typing import Any, NamedTuple

import torch

from engine.audit.cases import SCHEDULE, Adapter, Case, Job, make_case
from engine.audit.classify import EXACT, UNNAMED, Found, judge
from engine.audit.recorder import Log, recorded
from engine.conformance import processes
from engine.errors import UserError
from strategies.torch_internals import is_lost_contact

ENDED = ("did not end", "_LostContact")  # of a process that waited for another
HEAD = ("case", "verdict", "relative error", "ranks' difference", "collectives", "bytes reduced", "seconds")


class Row(NamedTuple):
    """A case, what was found, and how long it took."""

    case: str
    found: Found
    seconds: float

    def cells(self) -> list[str]:
        """Return the values of the columns, as in HEAD."""
        error, apart = ("-" if math.isnan(v) else f"{v:.1e}" for v in (self.found.error, self.found.difference))
        traffic = f"{self.found.collectives}", f"{self.found.reduced_bytes}"
        return [self.case, self.found.verdict, error, apart, *traffic, f"{self.seconds:.1f}"]


@dataclass
class Report:
    """The rows of an audit; `exact` if each case is. Collectives and bytes are those of an update on process 0."""

    rows: list[Row]

    @property
    def exact(self) -> bool:
        """Whether each case is exact."""
        return all(row.found.verdict == EXACT for row in self.rows)

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict by case."""
        return {row.case: row.found.verdict for row in self.rows}

    def text(self) -> str:
        """Return an aligned table, and what is known beside it."""
        rows = [list(HEAD), *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{row.case}: {row.found.detail}" for row in self.rows if row.found.detail)])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [list(HEAD), ["---"] * len(HEAD), *(row.cells() for row in self.rows)]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def as_json(self) -> list[dict[str, Any]]:
        """Return a dictionary for each case. What is not known, or not finite, is None."""
        rows = [{"case": row.case, **asdict(row.found), "seconds": row.seconds} for row in self.rows]
        known = lambda value: not isinstance(value, float) or math.isfinite(value)  # noqa: E731
        return [{key: value if known(value) else None for key, value in row.items()} for row in rows]


def audit(
    adapter: Adapter | Callable[[Job], object],
    processes: int = 2,
    cases: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float64,
    seconds: float = 60.0,
) -> Report:
    """Run the cases on real processes, and compare the gradient of each `optimizer.step` with that of one big batch.

    Each run of a case has `seconds`. `cases` are those of the adapter if None; of two processes uneven, on one, is left
    out. Raises UserError for values that cannot be audited.
    """
    adapter = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    adapter = Adapter(adapter.train, adapter.make, adapter.cases if cases is None else cases)
    if not 1 <= processes <= 4:
        raise UserError(f"processes={processes}: expected 1 to 4.")
    if dtype not in (torch.float64, torch.float32):
        raise UserError(f"dtype={dtype}: expected torch.float64 or torch.float32.")
    names = [name for name in adapter.cases if processes > 1 or name != "uneven processes"]
    return Report([_row(adapter, make_case(name, processes, dtype), dtype, seconds) for name in names])


def _row(adapter: Adapter, case: Case, dtype: torch.dtype, seconds: float) -> Row:
    start = time.monotonic()
    try:
        with TemporaryDirectory() as folder:
            runs = [_run(adapter, case, case.P, dtype, seconds, folder, False)]
            if case.second_P:
                runs.append(_run(adapter, case, case.second_P, dtype, seconds, folder, True))
        found = judge(case, runs, adapter.make, dtype)
    except processes.ProcessesFailedError as error:
        found = _failure(error)
    return Row(case.name, found, time.monotonic() - start)


def _run(
    adapter: Adapter, case: Case, P: int, dtype: torch.dtype, seconds: float, folder: str, resumes: bool
) -> list[Log]:
    """Train on P processes and return their logs. Each waits for all to end, as in a real run."""
    met = multiprocessing.get_context("fork").Barrier(P)
    pieces = case.on(P)
    x, y, weight = (values.to(dtype) for values in (case.task.x, case.task.y, case.task.weight))

    def train(rank: int) -> Log:
        torch.manual_seed(0)
        K = case.second_K if resumes else case.K
        schedule = {0: K, 1: case.second_K} if case.name == SCHEDULE else {0: K}
        stop_after = None if resumes else case.stop_after
        job = Job(
            adapter.make().to(dtype), rank, P, K, schedule, folder, stop_after, resumes,
            _tensors=(x, y, weight), _pieces=pieces[rank], _samples=case.samples,
        )  # fmt: skip
        try:
            with recorded(job.model, x) as log:
                adapter.train(job)
        except Exception as error:
            met.abort()
            raise (_LostContactError(str(error)) if is_lost_contact(error) else error) from error
        with suppress(BrokenBarrierError):
            met.wait()
        log.from_dataset = job.from_dataset
        return log

    return processes.run(P, lambda: train(int(processes.os.environ["RANK"])), seconds=seconds, own_store=True)


class _LostContactError(Exception):
    """Another process has gone while this one communicated with it."""


def _failure(error: processes.ProcessesFailedError) -> Found:
    own = {rank: text for rank, text in error.errors.items() if not text.startswith(ENDED)}
    if not own:
        return Found("hang", detail=str(error))
    rank, text = next(iter(own.items()))
    return Found("crash on one process" if len(own) == 1 else UNNAMED, detail=f"process {rank}: {text}")
