"""The command line: options to objects, one run, one message if something is wrong."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
import tomllib
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader

from engine.callbacks import Callback
from engine.cli.help import print_help
from engine.cli.modes import OneWindow, options, split
from engine.cli.parser_errors import plain
from engine.errors import REPORTED, UserError
from engine.preview.preview import preview
from engine.preview.table import print_plan
from engine.settings import OPTIONS, Settings
from engine.signals import EXIT_STATUS
from engine.task import Task
from engine.trainer import Trainer
from strategies.environment import as_if_started, started_processes, started_rank

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "launch" / "recipes" / "digits" / "digits.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the options say, or plan or check it, and return the exit status.

    0: the run has ended. 2: invalid options, or a task that cannot be trained. 75: the run was interrupted and has
    saved itself, and resumes when it is started again.
    """
    try:
        with (
            nullcontext() if started_rank() == 0 else redirect_stdout(io.StringIO())
        ):  # --help, --print_config and --plan speak once
            modes, rest = split(sys.argv[1:] if arguments is None else arguments)
            if modes.help:
                print_help(make_parser())
                return 0
            parser, config = parse(rest)
            if modes.plan and started_rank() != 0:
                return 0
            if modes.plan:
                _plan(parser, config, getattr(modes, "plan.processes"))
                return 0
        if modes.check:
            _check(parser, config)
            return 0
        _forget_earlier_start()
        trainer, task = _make(parser, config)
        trainer.callbacks.append(_KeepCommand(parser.dump(config)))
        trainer.fit(task)
        if not trainer.interrupted_by:
            return 0
        if "TALLY_SAVED" in os.environ:  # launch/start.py asks
            Path(os.environ["TALLY_SAVED"]).touch()
        return EXIT_STATUS
    except ArgumentError as error:
        actions = [*make_parser()._actions, *options()._actions]
        return _refuse(plain(str(error), [name for action in actions for name in action.option_strings]))
    except Exception as error:
        if (reported := _reported(error)) is None:
            raise
        return _refuse(" ".join(str(reported).split()))


def parse(arguments: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Return the parser and the resolved configuration. Raises ArgumentError."""
    if not any(a.split("=")[0] in ("--config", "--task") for a in arguments):
        arguments = [f"--config={DEFAULT}", *arguments]
    arguments = [re.sub("^--resume(?==|$)", "--trainer.resume", argument) for argument in arguments]
    parser = make_parser()
    return parser, parser.parse_args(arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of a run's options."""
    set_loader("tally", _load, exceptions=(yaml.YAMLError,))
    set_dumper("tally", lambda content: yaml.safe_dump(content, sort_keys=False))
    parser = ArgumentParser(
        prog="engine/run.py",
        description="Train a task with exact gradient accumulation, on one process or many (torchrun).",
        parser_mode="tally",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a TOML or YAML file of these options")
    parser.add_subclass_arguments(Task, "task", help="what to train: a Task by its class path")
    parser.add_class_arguments(Settings, "trainer")
    for action in parser._actions:
        if (option := OPTIONS.get(action.dest.removeprefix("trainer."))) is not None:
            action.help = option.text
    parser.set_defaults({"trainer.progress": True, "trainer.run_dir": _fresh_folder()})
    return parser


def _make(parser: ArgumentParser, config: Namespace) -> tuple[Trainer, Task]:
    """Return the trainer and the task of a resolved configuration."""
    built = parser.instantiate(config)
    return Trainer(**vars(built.trainer)), built.task


def _plan(parser: ArgumentParser, config: Namespace, processes: int | None) -> None:
    """Print what the run would do with so many processes; only its data and model are made."""
    with as_if_started(started_processes() if processes is None else processes):
        print_plan(preview(*_make(parser, config)))


def _check(parser: ArgumentParser, config: Namespace) -> None:
    """Run one window of all that was asked for, but keep nothing: no folder, no loggers, a little validation."""
    settings = config.trainer
    for name in ("run_dir", "loggers", "save_every_n_updates", "keep_best"):
        settings[name] = None
    settings.progress = False
    few = settings.micro_batch_size * started_processes()
    settings.max_validation_samples = min(few, settings.max_validation_samples or few)
    trainer, task = _make(parser, config)
    trainer.callbacks.append(OneWindow())
    trainer.fit(task)


def _fresh_folder() -> str:
    """Name a new folder, or that of the attempt before where torchrun has restarted this process."""
    link = _link_of_this_start()
    if _is_restarted() and link.is_symlink():
        return f"runs/{link.readlink()}"
    name = datetime.now().strftime("runs/%Y%m%d-%H%M%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _forget_earlier_start() -> None:
    """Remove the link of an earlier start by the same name, before a restart of this one could follow it."""
    if started_rank() == 0 and not _is_restarted():
        _link_of_this_start().unlink(missing_ok=True)


def _is_restarted() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _link_of_this_start() -> Path:
    """The link to the folder of what one torchrun command has started."""
    start = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return Path("runs") / f".started-by-{start if start != 'none' else os.getppid()}"


class _KeepCommand(Callback):
    """Keeps the resolved options beside the run, to be given to `--config`, and points `latest` to it."""

    def __init__(self, config: str) -> None:
        self._config = config

    def on_fit_start(self, trainer: Trainer) -> None:
        """Compare the options of all processes, and keep those of process 0."""
        everyone = trainer.strategy.gather(re.sub(r" *run_dir: .*", "", self._config))
        if len(set(everyone)) > 1:
            lines = [set(config.splitlines()) for config in everyone]
            differing = sorted(set().union(*lines) - set.intersection(*lines))
            raise UserError(f"processes were started with different options: {'; '.join(map(str.strip, differing))}.")
        if trainer.run_folder is None:
            return
        folder = trainer.run_folder.path
        (folder / "config.yaml").write_text(self._config)
        if folder.parent.name == "runs":
            for link in (folder.parent / "latest", folder.parent / _link_of_this_start().name):
                new = folder.parent / f".latest-{folder.name}"
                new.unlink(missing_ok=True)
                new.symlink_to(folder.name)
                new.replace(link)


def _load(text: str) -> Any:
    """A file of options is TOML or YAML; a value on the command line is YAML, as in {0: 8, 4: 4}."""
    try:
        return _with_init_args(tomllib.loads(text))
    except tomllib.TOMLDecodeError as no_toml:
        try:
            return _with_init_args(yaml.safe_load(text))
        except yaml.YAMLError as no_yaml:
            why = " ".join(str(no_yaml).split())
            raise yaml.YAMLError(f"this is neither TOML ({no_toml}) nor YAML ({why}).") from no_yaml


def _with_init_args(content: Any) -> Any:
    """Return `content` with the options that stand beside a `class_path` in its `init_args`, where the parser looks."""
    if isinstance(content, list):
        return [_with_init_args(part) for part in content]
    if not isinstance(content, dict):
        return content
    parts = {name: _with_init_args(part) for name, part in content.items()}
    if "class_path" not in parts or not isinstance(inner := parts.get("init_args", {}), dict):
        return parts
    kept = {name: parts.pop(name) for name in ("class_path", "dict_kwargs") if name in parts}
    parts.pop("init_args", None)
    return {**kept, "init_args": {**parts, **inner}} if parts or inner else kept


def _reported(error: Exception) -> BaseException | None:
    """Return the error that our own code raised for the user to mend; the option parser may have wrapped it."""
    if isinstance(error, REPORTED):
        return error
    return error.__cause__ if isinstance(error.__cause__, REPORTED) else None


def _refuse(message: str) -> int:
    """Print what is wrong, once: process 0 does, and another one if it is still there after a while."""
    if started_rank() != 0:
        time.sleep(10)  # torchrun ends all processes when the first of them has failed
    print(f"engine/run.py: {message}", file=sys.stderr, flush=True)
    return 2
