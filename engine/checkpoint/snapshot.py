"""What a checkpoint holds of a run, how a run takes it up again, and when it must not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from engine.checkpoint import files, tree
from engine.checkpoint.files import CheckpointError
from engine.plan.schedule import Schedule, Unit, solve
from strategies import Strategy

if TYPE_CHECKING:
    from engine.trainer import Trainer

log = logging.getLogger("tally")

WINDOWS = ("micro_batch_size", "accumulate_grad_batches", "effective_batch_size", "scheduling", "scheduling_unit")
"""Settings that say how long a window is."""

DECIDES = (
    *WINDOWS,
    "seed",
    "shuffle",
    "spread_windows",
    "precision",
    "lr_rule",
    "lr_reference_batch",
    "gradient_clip_norm",
    "skip_nonfinite_updates",
)
"""Settings without which a run would not be the same run. P is not among them, nor is where the run ends."""

COUNTERS: dict[str, Any] = {
    "epoch": 0,
    "update": 0,
    "samples": 0,
    "weight": 0.0,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "validated": 0,
    "begun": -1,
    "ended": -1,
    "seconds": 0.0,
    "record": {},
    "metrics": {},
}
"""What a trainer counts, and where it begins."""

POSITION = {"epoch": int, "place": int, "taken": int, "ended": bool, "state": None}
"""What a stream's position holds; that of a dataset is the epoch and an offset."""


class Saved:
    """A checkpoint that was read: model, and state by topic."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self._state = files.read(path)
        try:
            self._check()
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {path} does not hold what it should: {error!r}") from error

    def __getitem__(self, topic: str) -> Any:
        """Return the state of a topic."""
        return self._state[topic]

    def _check(self) -> None:
        """Make sure that the state is of the right kinds: the file may be anybody's."""
        state = self._state
        state.setdefault("strategy", None)  # older ones have none
        for name, value in COUNTERS.items():
            _expect(type(state["run"][name]) is type(value), f"run.{name}")
            _expect(not isinstance(value, int) or state["run"][name] >= value, f"run.{name}")
        positions = state["positions"]
        _expect(positions is None or (isinstance(positions, list) and len(positions) > 0), "positions")
        for position in positions or ():
            is_offset = isinstance(position, tuple) and [type(part) for part in position] == [int, int]
            kinds = {name: type(part) for name, part in position.items()} if isinstance(position, dict) else {}
            _expect(is_offset or {**kinds, "state": None} == POSITION, "positions")
        stages = state["schedule"]["effective_batches"]
        _expect(all(type(n) is int for pair in stages.items() for n in pair) and min(stages) == 0, "schedule")
        _expect(min(stages.values()) > 0 and state["schedule"]["unit"] in get_args(Unit), "schedule")
        for name in ("decides", "loop", "optimizer"):
            _expect(isinstance(state[name], dict), name)
        draws = [[type(part) for part in one] for one in state["draws"]]
        _expect(len(draws) > 0 and all(kinds == [bool, int] for kinds in draws), "draws")
        _expect(0 <= state["loop"]["late_weight"] < math.inf, "loop.late_weight")
        _expect(state["best"] is None or isinstance(state["best"]["value"], float), "best")


def _expect(is_so: bool, name: str) -> None:
    if not is_so:
        raise ValueError(name)


def find(resume: str, folder: Path | None, strategy: Strategy) -> Saved | None:
    """Return the checkpoint to go on from, the same on all processes: the newest whole one in `folder`, or `resume`.

    A path elsewhere counts only until `folder` has a checkpoint of its own: the same command can be given again.
    Process 0 chooses, and tells of those that it passes over. Raises CheckpointError for a path that is none, and where
    another process sees another disk.
    """
    chosen: tuple[str, str] | str | None = None
    if strategy.rank == 0:
        try:
            chosen = _choose(resume, folder)
        except (CheckpointError, OSError) as error:
            chosen = str(error)
    chosen = strategy.gather(chosen)[0]
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    if chosen is None:
        return None
    path, identity = chosen
    problem = "" if strategy.rank == 0 else _unlike(Path(path), identity)
    problems = [f"process {rank}: {text}" for rank, text in enumerate(strategy.gather(problem)) if text]
    if problems:
        raise CheckpointError(
            f"not all processes see the checkpoint {path} of process 0 ({'; '.join(problems)}): give a run_dir on a "
            "disk that all hosts share."
        )
    return Saved(Path(path))


def _choose(resume: str, folder: Path | None) -> tuple[str, str] | None:
    own = files.candidates(folder) if folder else []
    if resume != "auto" and not (folder and own and not Path(resume).resolve().is_relative_to(folder.resolve().parent)):
        path = Path(resume)
        within = files.candidates(path) or files.candidates(path / "checkpoints")
        path = within[0] if within else path
        return str(path), files.verify(path)
    for path in own:
        try:
            return str(path), files.verify(path)
        except (CheckpointError, OSError) as error:
            log.error("%s The one before is used.", error)
    if own:
        raise CheckpointError(
            f"none of the {len(own)} checkpoints in {folder} is whole: restore one, or start a new run."
        )
    return None


def _unlike(path: Path, identity: str) -> str:
    try:
        return "" if files.verify(path) == identity else "it has another one there"
    except (CheckpointError, OSError) as error:
        return str(error)


def snapshot(trainer: Trainer) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return (model, state) of a run at a boundary, copied; on all processes together, of use on process 0."""
    strategy = trainer.strategy
    positions = None if trainer.positions is None else strategy.gather(trainer.positions)
    parts: dict[str, Any] = {"model": {}, "optimizer": {}}
    if strategy.rank == 0 or not strategy.holds_all:
        parts = strategy.state_dict(trainer.optimizer)
    scheduler, draws = trainer.lr_scheduler, trainer.loop.host_randomness
    rest = {
        "run": {name: getattr(trainer, name) for name in COUNTERS},
        "positions": positions,
        "schedule": {
            "unit": trainer.schedule.unit,
            "effective_batches": {stage.first: stage.effective_batch for stage in trainer.schedule.stages},
        },
        "decides": decides(trainer),
        "loop": trainer.loop.state_dict(),
        "draws": strategy.gather(None if draws is None else draws.state()),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "callbacks": [[class_path(callback), callback.state_dict()] for callback in trainer.callbacks],
    }
    return parts["model"], {"optimizer": parts["optimizer"], "strategy": parts.get("strategy"), **tree.copied(rest)}


def decides(trainer: Trainer) -> dict[str, Any]:
    """Return everything without which a resumed run would not be the run that was interrupted, as texts."""
    settings = trainer.configuration
    return {
        **{name: str(settings[name]) for name in DECIDES},
        "the number of training samples": str(trainer.plan.samples if trainer.plan else None),
        "the optimizer": type(trainer.optimizer).__name__,
        "the LR scheduler": type(trainer.lr_scheduler).__name__,
    }


def schedule_of(saved: Saved, N: int, strategy: Strategy) -> Schedule:
    """Return the schedule that keeps each stage's effective batch, solved for the processes that there are now."""
    stages = {int(first): int(B) for first, B in saved["schedule"]["effective_batches"].items()}
    return solve(stages, N, strategy.effective_batch, saved["schedule"]["unit"])


def restore(trainer: Trainer, saved: Saved, allows_changes: bool) -> None:
    """Put a run where a checkpoint was taken. Raises CheckpointError, and names what differs, where it cannot be."""
    try:
        _compare(decides(trainer), saved, allows_changes)
        check_model_state(trainer.strategy.state_dict()["model"], saved.model, saved.path)
        mine, theirs = decides(trainer), saved["decides"]
        has_same_optimizer = mine["the optimizer"] == theirs["the optimizer"]
        parts = {"model": saved.model, "optimizer": saved["optimizer"], "strategy": saved["strategy"]}
        trainer.strategy.load_state_dict(parts, trainer.optimizer if has_same_optimizer else None)
        if trainer.lr_scheduler is not None and mine["the LR scheduler"] == theirs["the LR scheduler"]:
            trainer.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        trainer.loop.load_state_dict(saved["loop"], mine["precision"] == theirs["precision"])
        if (draws := trainer.loop.host_randomness) is not None:
            draws.load_state(saved["draws"], trainer.strategy.rank, len(trainer.strategy.gather(None)))
        for name in COUNTERS:
            setattr(trainer, name, saved["run"][name])
        callbacks = list(trainer.callbacks)
        for name, state in saved["callbacks"]:
            found = next((callback for callback in callbacks if class_path(callback) == name), None)
            if found is not None:
                callbacks.remove(found)
                found.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {saved.path} does not fit this run: {type(error).__name__}: {error}"
        ) from error


def check_model_state(own: Mapping[str, Any], saved: Mapping[str, Any], source: Path) -> None:
    """Compare names, shapes and dtypes. Raises CheckpointError that tells the first that differ."""

    def sketch(state: Mapping[str, Any]) -> dict[str, str]:
        return {n: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else "extra" for n, v in state.items()}

    mine, theirs = sketch(own), sketch(saved)
    differing = [
        f"{name} is {theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"{source} is of another model: {'; '.join(differing[:3])}{more}.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load pretrained weights, a safetensors file under the model's own names. Raises CheckpointError."""
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except Exception as error:
        raise CheckpointError(f"weights={str(path)!r} cannot be read: {error}. Give a .safetensors file.") from error
    names = {name.replace("_orig_mod.", ""): name for name in model.state_dict()}  # those of torch.compile
    own = {name: model.state_dict()[full] for name, full in names.items()}
    check_model_state({name: value for name, value in own.items() if isinstance(value, Tensor)}, weights, path)
    model.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)


def _compare(mine: Mapping[str, Any], saved: Saved, allows_changes: bool) -> None:
    theirs = saved["decides"]
    differing = [f"{n} was {theirs.get(n)} and is {mine.get(n)}" for n in mine if mine[n] != theirs.get(n)]
    if not differing:
        return
    if not allows_changes:
        raise CheckpointError(
            f"checkpoint {saved.path} is of another run: {'; '.join(differing)}. Start a new run_dir, or allow it with "
            "resume_with_changes=True."
        )
    log.warning("going on with changes: %s.", "; ".join(differing))


def class_path(value: object) -> str:
    """Return where the class of `value` can be imported from."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
