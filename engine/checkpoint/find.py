"""Finds the checkpoint to resume from, the same on all processes, and checks what it holds."""

import logging
import math
import platform
from pathlib import Path
from typing import Any, get_args

from torch import nn

from engine.checkpoint import files
from engine.checkpoint.base import with_base
from engine.errors import CheckpointError
from engine.plan.schedule import Unit
from engine.records.run_folder import check_plain, read_mark
from engine.state import RunState, shared_fields
from strategies import Strategy

log = logging.getLogger("tally")

# The types in a position, but for a stream's `state`; that of a dataset is a pair
DATASET_POSITION = {"epoch": int, "offset": int}
STREAM_POSITION = {"epoch": int, "seed_index": int, "length_before": int, "taken": int, "has_ended": bool}
LARGEST_COUNT = 1 << 53  # more updates, samples or seconds than any run has


class Checkpoint:
    """A checkpoint that was read: the model, and state by topic. Raises CheckpointError for invalid content."""

    def __init__(self, path: Path, is_verified: bool = False) -> None:
        self.path = path
        if not is_verified:
            files.verify(path)
        self.model, self._state = files.read(path)
        try:
            self._check()
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {path} has invalid content: {error!r}") from error

    def __getitem__(self, topic: str) -> Any:
        """Return the state of a topic."""
        return self._state[topic]

    def complete(self, model: nn.Module) -> None:
        """Add what it was saved without, of `model`. Raises CheckpointError if that is another base."""
        self.model = with_base(model, self.model, self["left_out"], self.path)

    def _check(self) -> None:
        """Check the types of all that is used: the file may come from anybody."""
        state, initial = self._state, RunState()
        state["run"] = {"micro_batch_size": 0, "stream_micro_batch_size": 0, **state["run"]}  # older ones lack them
        for name in shared_fields():
            value, least = state["run"][name], getattr(initial, name)
            _expect(type(value) is type(least), f"run.{name}")
            _expect(not isinstance(least, int | float) or least <= value < LARGEST_COUNT, f"run.{name}")
        run, samples = state["run"], str(state["identity"].get("the number of training samples"))
        _expect(all(type(value) in (int, float) for value in run["metrics"].values()), "run.metrics")
        positions = state["positions"]
        _expect(positions is None or (isinstance(positions, list) and len(positions) > 0), "positions")
        for position in positions or ():
            place = dict(zip(DATASET_POSITION, position, strict=True)) if isinstance(position, tuple) else position
            kinds = {name: type(part) for name, part in place.items() if name != "state"}
            _expect(kinds in (DATASET_POSITION, STREAM_POSITION), "positions")
            _expect(all(0 <= value < LARGEST_COUNT for value in place.values() if type(value) is int), "positions")
            _expect(place["epoch"] <= run["epoch"] and place.get("taken", 0) <= place.get("seed_index", 0), "positions")
            is_within = not samples.isdecimal() or place.get("offset", 0) <= int(samples)
            _expect(is_within or place["epoch"] < run["epoch"], "positions")
        stages = state["schedule"]["effective_batches"]
        _expect(all(type(n) is int for pair in stages.items() for n in pair) and min(stages) == 0, "schedule")
        _expect(0 < min(stages.values()) <= max(stages.values()) < LARGEST_COUNT, "schedule")
        _expect(state["schedule"]["unit"] in get_args(Unit), "schedule")
        for name in ("identity", "updater", "optimizer"):
            _expect(isinstance(state[name], dict), name)
        host_rng = [[type(part) for part in one] for one in state["host_rng"]]
        _expect(len(host_rng) > 0 and all(kinds == [bool, int] for kinds in host_rng), "host_rng")
        _expect(0 <= state["updater"]["late_weight"] < math.inf, "updater.late_weight")
        _expect(isinstance(state.setdefault("left_out", None), dict | None), "left_out")
        _expect(state["best"] is None or isinstance(state["best"]["value"], float), "best")


def _expect(is_so: bool, name: str) -> None:
    if not is_so:
        raise ValueError(name)


def find_checkpoint(resume: str, run_dir: Path | None, strategy: Strategy) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run in `run_dir`, or that of the path `resume`, or None.

    A path elsewhere counts only until `run_dir` has one of its own. Process 0 chooses; one process of each host reads
    it whole. Raises CheckpointError for a path that is not a checkpoint, and if a process sees another disk.
    """
    chosen: tuple[str, str] | str | None = None
    if strategy.rank == 0:
        try:
            chosen = _choose(resume, run_dir)
        except (CheckpointError, OSError) as error:
            chosen = str(error)
    chosen = strategy.first(chosen)
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    if chosen is None:
        return None
    path, digest = chosen
    host = platform.node()
    is_first_of_host = strategy.compare(host).index(host) == strategy.rank
    problem = "" if strategy.rank == 0 else _difference(Path(path), digest, is_first_of_host)
    if problems := [f"process {rank}: {text}" for rank, text in enumerate(strategy.compare(problem)) if text]:
        raise CheckpointError(
            f"not all processes see the checkpoint {path} of process 0 ({'; '.join(problems)}). Use a run_dir on "
            "storage shared by all hosts."
        )
    return Checkpoint(Path(path), is_verified=True)


def _choose(resume: str, run_dir: Path | None) -> tuple[str, str] | None:
    if run_dir is not None and run_dir.is_dir():
        check_plain(run_dir)
    own = files.candidates(run_dir / "checkpoints") if run_dir else []
    if resume != "auto" and not (run_dir and own and not Path(resume).resolve().is_relative_to(run_dir.resolve())):
        path = Path(resume)
        path = next(iter(files.candidates(path) or files.candidates(path / "checkpoints")), path)
        return str(path), files.verify(path)
    run = (read_mark(run_dir) or {}).get("run") if run_dir else None
    for path in own:
        try:
            return str(path), files.verify(path, run)
        except (CheckpointError, OSError) as error:
            log.error("%s The one before is used.", error)
    if own:
        raise CheckpointError(
            f"none of the {len(own)} checkpoints in {own[0].parent} is whole and of this run. Restore one, or name "
            "one with resume=PATH."
        )
    return None


def _difference(path: Path, digest: str, reads_files: bool) -> str:
    try:
        return "" if files.verify(path, reads_files=reads_files) == digest else "it has another one there"
    except (CheckpointError, OSError) as error:
        return str(error)
