"""Predictions: a task's outputs for each sample of some data once, in order, in memory or in files."""

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.disk import new_part
from engine.errors import ProcessFailureError, UserError, describe
from engine.memory import free_memory
from engine.task import tensors
from engine.training.validation import Validation
from strategies import MicroBatch

PART_BYTES = 64 << 20  # bytes of outputs from which on they go into a file


class Prediction(Validation):
    """Predicts on data of the kinds that `Task.validation_data` may return."""

    def run_on(self, model: nn.Module, folder: str | None) -> Any:
        """Return all outputs, or write them into `folder`, on process 0. It holds one micro-batch of each process."""
        outputs = Outputs(folder, self.samples)
        keeps = self._strategy.rank == 0
        self._together(lambda: outputs.open() if keeps else None)
        parts: list[Any] = []
        with self._evaluating(model, lambda model, batch: {"": self._task.predict(model, batch)}) as predict:
            micros = self._micros()

            def next_round() -> Any:
                if keeps:
                    outputs.add(parts)
                micro = next(micros, None)
                return micro and [_rows(found, micro) for found in predict(micro.batch).values()]

            while rows := [row for row in self._together(next_round) if row is not None]:
                parts[:] = chain(*rows)  # neighbours have neighbouring ranks
        self._together(lambda: outputs.end() if keeps else None)
        return outputs.whole

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Return what `work` returns on each process. If it fails on one, all raise."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if self._strategy.has_lost_contact(error) or not self._strategy.evaluates_alone:
                raise  # the others do not get to the gather
            failure = error
        everyone = self._strategy.gather((result, failure and describe(failure)))
        if failure is not None:
            raise failure
        if failures := [f"process {rank} failed: {text}" for rank, (_, text) in enumerate(everyone) if text]:
            raise ProcessFailureError("; ".join(failures))
        return [result for result, _ in everyone]


class Outputs:
    """The outputs on process 0: all of them, for `samples` (None: unknown), or the files of a new folder."""

    def __init__(self, folder: str | None, samples: int | None) -> None:
        self._folder, self._samples = None if folder is None else Path(folder), samples
        self._parts: list[dict[str, Any]] = []
        self._kinds: dict[str, str] = {}
        self._done = self._bytes = self._files = 0
        self.whole: Any = None  # all outputs, once they are in memory

    def open(self) -> None:
        """Make the folder. Raises UserError for one that is in use."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if any(self._folder.iterdir()):
                raise UserError(f"folder={str(self._folder)!r}: expected a new or an empty folder. Use another.")

    def add(self, parts: list[dict[str, Any]]) -> None:
        """Add the next outputs. Raises UserError if they do not fit one another, the files or the memory."""
        for part in parts:
            kinds = {name: _kind(rows) for name, rows in part.items()}
            self._kinds = self._kinds or kinds
            if kinds != self._kinds:
                raise UserError(
                    f"predict() returned rows of {kinds} after rows of {self._kinds}: expected the same. Pad them to "
                    "one length, or return a list."
                )
            if self._folder is not None and "list" in kinds.values():
                raise UserError("predict() returned a list, and files hold tensors only. Pad it to one length.")
            self._done += len(next(iter(part.values())))
            self._bytes += sum(tensor.nbytes for _, tensor in tensors(part))
        self._parts += parts
        needed = 2 * self._bytes * (self._samples or self._done) // max(self._done, 1) - self._bytes
        if self._folder is None and needed > (free := free_memory()):
            raise UserError(
                f"all predictions, and a copy to put them together, need {needed / 1e9:.1f} GB more: expected at most "
                f"the {free / 1e9:.1f} GB of free memory. Use folder=PATH, which writes them to files."
            )
        if self._folder is not None and self._bytes >= PART_BYTES:
            self._write(self._folder)

    def end(self) -> None:
        """Put all outputs together, or write the rest. Raises UserError without any."""
        if not self._kinds:
            raise UserError("the data to predict on has no sample: expected at least one.")
        if self._folder is None:
            joined = self._joined()
            self.whole = joined.get("", joined)
        elif self._parts:
            self._write(self._folder)

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        path = folder / f"part-{self._files:05d}.safetensors"
        save_file({name or "output": rows for name, rows in self._joined().items()}, part := new_part(path))
        part.replace(path)
        self._files, self._bytes = self._files + 1, 0

    def _joined(self) -> dict[str, Any]:
        columns = {name: [part[name] for part in self._parts] for name in self._kinds}
        self._parts = []
        return {n: [*chain(*rows)] if self._kinds[n] == "list" else torch.cat(rows) for n, rows in columns.items()}


def _rows(found: Any, micro: MicroBatch) -> dict[str, Any]:
    """Return a micro-batch's outputs by name, on the CPU. Raises UserError unless each has a row for each sample."""
    named = dict(found) if isinstance(found, Mapping) else {"": found}
    for rows in named.values():
        has_rows = isinstance(rows, list) or (isinstance(rows, Tensor) and rows.ndim > 0)
        if not has_rows or (len(rows) != micro.size and not micro.size_problem):
            what = f"{type(rows).__name__} of shape {tuple(getattr(rows, 'shape', ()))}"
            raise UserError(
                f"predict() returned a {what} for {micro.size} samples: expected a row for each, in a tensor, a list, "
                "or a dictionary of them."
            )
    return {name: rows.cpu().contiguous() if isinstance(rows, Tensor) else rows for name, rows in named.items()}


def _kind(rows: Any) -> str:
    return f"{rows.dtype} {tuple(rows.shape[1:])}" if isinstance(rows, Tensor) else "list"
