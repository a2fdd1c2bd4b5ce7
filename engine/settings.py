"""The settings of a run: one list of names, from which signature, checks, `--help`, identity and docs are made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec

from engine.callbacks.base import Callback
from engine.errors import UserError, check_count
from engine.loggers.base import Logger
from engine.plan.schedule import check_accumulation, check_lr_rule
from engine.records.metric import MetricRule
from engine.update.precision import check_precision
from strategies import Strategy

WINDOWS = "Windows: P processes x K micro-batches x N samples make one update"
END = "End of the run"
PLACE = "Processes and precision"
UPDATES = "Updates and data order"
LR = "Learning rate and effective batch"
KEEPING = "Checkpoints and resuming"
VALIDATION = "Validation"
LOADING = "Loading data"
OUTPUT = "Output"
SECTIONS = (WINDOWS, END, PLACE, UPDATES, LR, KEEPING, VALIDATION, LOADING, OUTPUT)
"""The sections of `--help` and the docs, in their order."""

AUTO = "auto"  # the micro-batch size of a run that finds it by itself

Check = Callable[[str, Any], object]  # takes a setting's name and value; raises UserError for an invalid one

P = ParamSpec("P")


class Option(NamedTuple):
    """The description of one setting, beside its type and default."""

    text: str  # for `--help` and the docs
    section: str
    check: Check | None = None  # its own, if its type does not say enough; None passes where the type has it
    identity: bool = False  # a resumed run must have the same value
    sets_windows: bool = False  # it says how long a window is: a checkpoint's effective batches stay if these do
    is_recorded: bool = True  # config.json has it


def _declares(describe: Callable[P, Option]) -> Callable[Concatenate[Any, P], Any]:
    def declare(default: Any, /, *texts: P.args, **details: P.kwargs) -> Any:
        return field(default=default, metadata={"option": describe(*texts, **details)})

    return declare


option = _declares(Option)  # declares a setting by its default and the arguments of `Option`


def _torch_seed(name: str, value: Any) -> None:
    check_count(name, value, 0)
    if value >= 2**64:
        raise UserError(f"{name}={value}: expected a whole number below 2**64.")


def _switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: expected True or False.")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r}: expected a positive number, or None.")


# The checks of settings that have none of their own, by type
CHECKS: dict[str, Check] = {"int": check_count, "float": _positive, "bool": _switch}


def _size(name: str, value: object) -> None:
    if value != AUTO:
        check_count(name, value, why='Use "auto" to let the run find one.')


def _folder(name: str, value: object) -> None:
    if not _is_path(value):
        raise UserError(f"{name}={value!r}: expected the path of a folder, or None to write nothing.")


def _resume(name: str, value: Any) -> None:
    if value not in ("auto", "never") and not (_is_path(value) and Path(value).exists()):
        raise UserError(f"{name}={value!r}: no such checkpoint. Give its path, or use 'auto' or 'never'.")


def _weights(name: str, value: Any) -> None:
    if not (_is_path(value) and Path(value).is_file()):
        raise UserError(f"{name}={value!r}: no such file. Give a .safetensors file.")


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and str(value) != ""


@dataclass(frozen=True)
class Settings:
    """The settings of a run, checked one by one and against one another. Raises UserError for an invalid one."""

    strategy: Strategy | str = option(
        "auto", 'The strategy: "auto", "single", "dp", "ddp", "fsdp", "pipeline", or a `Strategy`.', PLACE
    )
    micro_batch_size: int | Literal["auto"] = option(
        32, 'N, samples per micro-batch of map-style data; "auto" finds the fastest.', WINDOWS, _size, sets_windows=True
    )
    accumulate_grad_batches: int = option(
        1, "K, micro-batches per process and window.", WINDOWS, lambda _, K: check_accumulation(K), sets_windows=True
    )
    effective_batch_size: int | None = option(
        None, "Samples per update over all processes; K then follows from P.", WINDOWS, sets_windows=True
    )
    max_epochs: int | None = option(None, "Epochs after which the run ends; this or `max_updates` is needed.", END)
    max_updates: int | None = option(None, "Updates after which the run ends; or `max_epochs`, if that is first.", END)
    max_time: float | None = option(None, "Seconds of training after which the run ends with the current update.", END)
    lr_rule: str = option("none", 'Scale the LR by the effective batch: "none", "linear" or "sqrt".', LR, identity=True)
    lr_reference_batch: int | None = option(None, "The effective batch of the task's learning rate.", LR, identity=True)
    gradient_clip_norm: float | None = option(None, "Clip an update's gradient to this 2-norm.", UPDATES, identity=True)
    precision: str | None = option(
        None, 'Autocast to "fp32", "bf16" or "fp16"; None keeps the dtype of the model.', PLACE, identity=True
    )
    compile_model: bool = option(False, 'Compile the model in place with torch.compile ("single" and "ddp").', PLACE)
    seed: int = option(0, "Seed of parameters, data order, dropout, augmentation.", UPDATES, _torch_seed, identity=True)
    shuffle: bool = option(True, "Shuffle each epoch; `Task.order` gives another order.", UPDATES, identity=True)
    spread_windows: bool = option(
        False, "Cut windows into equally many pieces for all processes; draws then depend on P.", WINDOWS, identity=True
    )
    callbacks: Callback | Sequence[Callback] | None = option(
        None, "One `Callback`, or a list of them; a `GradientAccumulationScheduler` changes K by epoch.", WINDOWS
    )
    loggers: Logger | str | Sequence[Logger | str] | None = option(
        None, '"csv", "tensorboard", "wandb", an object with `log` and `close`, or a list.', OUTPUT, is_recorded=False
    )
    run_dir: str | None = option(
        None, "The folder to write, seen by all hosts; None writes nothing.", KEEPING, _folder, is_recorded=False
    )
    resume: str = option("auto", '"auto": from `run_dir`; "never": a new run; or a checkpoint path.', KEEPING, _resume)
    resume_with_changes: bool = option(False, "Resume even if data, seed, windows or optimizer have changed.", KEEPING)
    weights: str | None = option(None, "A .safetensors file of weights that a new run starts from.", KEEPING, _weights)
    save_frozen: bool = option(True, "Save frozen parameters too; False notes their digests instead.", KEEPING)
    save_every_n_updates: int | None = option(None, "Save a checkpoint after each n-th update.", KEEPING)
    save_every_n_minutes: float | None = option(10.0, "Save when the newest is so old; None: not by time.", KEEPING)
    keep_last_checkpoints: int = option(2, "The number of newest checkpoints to keep.", KEEPING)
    keep_best: str | None = option(
        None, 'Keep the best checkpoint by a validation mean: "min:loss", "max:accuracy".', KEEPING, MetricRule
    )
    validate_every_n_epochs: int | None = option(
        1, "Validate after each n-th epoch, and at the end; None: only at the end.", VALIDATION
    )
    validate_every_n_updates: int | None = option(None, "Validate after each n-th update too.", VALIDATION)
    max_validation_samples: int | None = option(None, "Most samples to validate on (map-style data).", VALIDATION)
    skip_nonfinite_updates: bool = option(
        True, "Skip an update, on all processes, if its gradient norm is not finite.", UPDATES, identity=True
    )
    stop_after_n_skipped: int | None = option(100, "Raise an error after so many non-finite updates in a row.", UPDATES)
    num_workers: int = option(0, "Workers of torch's DataLoader (map-style).", LOADING, partial(check_count, least=0))
    pin_memory: bool | None = option(None, "Pin memory, as in torch's DataLoader; None pins for CUDA.", LOADING)
    persistent_workers: bool = option(True, "Keep workers between epochs, as in torch's DataLoader.", LOADING)
    prefetch_to_device: bool = option(False, "Move the next micro-batch to the device ahead; holds two more.", LOADING)
    deterministic: bool = option(False, "Use only algorithms that give the same bits, or raise an error.", PLACE)
    tf32: bool | None = option(None, "Whether float32 products may use TF32; None leaves torch's setting.", PLACE)
    progress: bool = option(False, "Print a banner and progress, on process 0.", OUTPUT, is_recorded=False)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, (kind, optional, _) = getattr(self, setting.name), str(setting.type).partition(" | None")
            check = OPTIONS[setting.name].check or CHECKS.get(kind)
            if check is not None and not (optional and value is None):
                check(setting.name, value)
        if self.max_epochs is None and self.max_updates is None:
            raise UserError("max_epochs=None, max_updates=None: expected an end. Give one, such as max_epochs=10.")
        if self.micro_batch_size == AUTO and self.effective_batch_size is None:
            raise UserError("micro_batch_size='auto': expected an effective_batch_size, which decides K. Give one.")
        check_precision(self.precision)
        check_lr_rule(self.lr_rule, self.lr_reference_batch)
        if (self.run_dir or self.weights) and find_spec("safetensors") is None:
            raise UserError("run_dir or weights: expected the package safetensors. Use pip install safetensors.")
        if self.run_dir is None and (self.save_every_n_updates is not None or self.keep_best):
            raise UserError("run_dir=None: save_every_n_updates and keep_best need a folder to save into. Give one.")

    @property
    def N(self) -> int:  # noqa: N802
        """The number that `micro_batch_size` is, or its default while "auto" has found none."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else 32

    def as_json(self, strategy: Strategy, callbacks: Sequence[Callback]) -> dict[str, Any]:
        """Return the recorded settings as JSON values, with strategy and callbacks by class."""
        stated = {name: getattr(self, name) for name, option in OPTIONS.items() if option.is_recorded}
        own = {name: value for name, value in vars(strategy).items() if not name.startswith("_")}
        paths = {"strategy": class_path(strategy), "callbacks": [class_path(callback) for callback in callbacks]}
        return {**stated, **paths, "strategy_options": own}


OPTIONS: dict[str, Option] = {field.name: field.metadata["option"] for field in fields(Settings)}
"""Every setting by name, in the order of the signature."""


def takes(
    settings: Callable[P, Settings],
) -> Callable[[Callable[[Any, Settings], None]], Callable[Concatenate[Any, P], None]]:
    """Let an `__init__(self, settings)` be called with the settings themselves, and have their signature."""

    def decorate(init: Callable[[Any, Settings], None]) -> Callable[Concatenate[Any, P], None]:
        def __init__(self: Any, /, *args: P.args, **options: P.kwargs) -> None:  # noqa: N807
            init(self, settings(*args, **options))

        stated = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *signature(settings).parameters.values()]
        __init__.__signature__ = Signature(stated)  # type: ignore[attr-defined]
        __init__.__doc__ = init.__doc__
        return __init__

    return decorate


def class_path(value: object) -> str:
    """Return the module and name of the class of `value`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
