"""The command line: options to objects, one run, one message if something is wrong."""

import io
import os
import re
import sys
import time
import tomllib
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader

from engine.callbacks import Callback
from engine.cli.help import print_help
from engine.cli.modes import OneWindow, options, split
from engine.cli.parser_errors import plain
from engine.disk import numbered, replace_text
from engine.errors import STATUSES, ProcessFailureError, UserError, describe, writing
from engine.preview.preview import Preview
from engine.preview.table import print_plan
from engine.settings import AUTO, OPTIONS, Settings
from engine.signals import COMMAND, EXIT_STATUS, leave_status
from engine.task import Task
from engine.trainer import Trainer
from strategies.environment import as_if_started, started_processes, started_rank

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10.0  # seconds that a process leaves to another one whose error says more, or the same
FRESH = "runs/%Y%m%d-%H%M%S"  # the `run_dir` of a run that names none: a new folder, called after the time of its start
DEFAULT = ROOT / "launch" / "recipes" / "digits" / "digits.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the options say, or plan or check it, and return the exit status.

    0: the run has ended. 75: the run was interrupted and has saved itself, and resumes when it is started again.
    Others are those of `STATUSES`, after one line that says why.
    """
    COMMAND.begin()
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        leave_status(status)
        return status
    except ArgumentError as error:
        actions = [*make_parser()._actions, *options()._actions]
        text = plain(str(error), [name for action in actions for name in action.option_strings])
        return _refuse(UserError(text))
    except Exception as error:
        for ours in filter(None, (error, error.__cause__)):  # the option parser may have wrapped it
            if isinstance(ours, tuple(STATUSES)):
                return _refuse(ours)
        raise
    finally:
        COMMAND.end()


def _run(arguments: Sequence[str]) -> int:
    speaks = started_rank() == 0  # --help, --print_config and --plan do once
    with nullcontext() if speaks else redirect_stdout(io.StringIO()):
        modes, rest = split(arguments)
        if modes.help:
            print_help(make_parser())
            return 0
        parser, config = parse(rest)
        if modes.plan:
            if speaks:
                with as_if_started(getattr(modes, "plan.processes") or started_processes()):
                    print_plan(Preview(*_make(parser, config)))
            return 0
    if modes.check:
        _check(parser, config)
        return 0
    _claim_fresh_folder(config)
    trainer, task = _make(parser, config)
    trainer.callbacks.append(_KeepCommand(parser.dump(config)))
    if trainer.settings.run_dir is None:
        COMMAND.let_go()
    trainer.fit(task)
    return EXIT_STATUS if trainer.interrupted_by else 0


def parse(arguments: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Return the parser and the resolved configuration. Raises ArgumentError."""
    if not any(a.split("=")[0] in ("--config", "--task") for a in arguments):
        arguments = [f"--config={DEFAULT}", *arguments]
    arguments = [re.sub("^--resume(?==|$)", "--trainer.resume", argument) for argument in arguments]
    for argument in arguments:
        value = argument.partition("=")[2] or argument
        if os.path.exists(value) and not (os.path.isfile(value) or os.path.isdir(value)):
            raise UserError(f"{argument}: expected a file, found a pipe or device. Use a file.")
    parser = make_parser()
    try:
        config = parser.parse_args(arguments)
        if not hasattr(config.trainer, "run_dir"):  # a file says `trainer: []`
            raise UserError("trainer: expected options by name. Use trainer.NAME=VALUE.")
        if config.task is None:
            raise UserError("task=None: expected a Task. Use --task=module.Class.")
        return parser, config
    except UnicodeDecodeError as error:
        raise UserError(f"--config: expected UTF-8 text ({error}). Save the file again as text.") from error
    except RecursionError:
        raise UserError(TOO_DEEP) from None


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
    parser.set_defaults({"trainer.progress": True, "trainer.run_dir": FRESH})
    return parser


def _make(parser: ArgumentParser, config: Namespace) -> tuple[Trainer, Task]:
    built = parser.instantiate(config)
    return Trainer(**vars(built.trainer)), built.task


def _check(parser: ArgumentParser, config: Namespace) -> None:
    """Run one window of all that was asked for, but keep nothing: no folder, no loggers, a little validation."""
    settings, best = config.trainer, config.trainer.keep_best
    for name in ("run_dir", "loggers", "save_every_n_updates", "keep_best"):
        settings[name] = None
    settings.progress = False
    N = settings.micro_batch_size
    few = (32 if N == AUTO else N) * started_processes()
    settings.max_validation_samples = min(few, settings.max_validation_samples or few)
    trainer, task = _make(parser, config)
    trainer.callbacks.append(OneWindow(best))
    trainer.fit(task)


def _claim_fresh_folder(config: Namespace) -> None:
    """Make the folder of a run that names none, or take that of the attempt before if torchrun has restarted it."""
    if config.trainer.run_dir != FRESH or started_rank() != 0:
        return
    link = _link_of_this_start()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and link.is_symlink():
        config.trainer.run_dir = f"runs/{link.readlink()}"
        return
    with writing("run_dir='runs'"):
        os.makedirs(os.path.realpath(link.parent), exist_ok=True)  # it may be a link to what is not there yet
        link.unlink(missing_ok=True)  # of an earlier start by the same name
        for free in numbered(datetime.now().strftime(FRESH)):
            with suppress(FileExistsError):  # another run may start in the same second
                free.mkdir(parents=True)
                config.trainer.run_dir = str(free)
                return


def _link_of_this_start() -> Path:
    """The link to the folder of what one torchrun command has started."""
    start = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return Path("runs") / f".started-by-{start.replace('/', '-') if start != 'none' else os.getppid()}"


class _KeepCommand(Callback):
    """Keeps the resolved options beside the run, to be given to `--config`, and points `latest` to it."""

    def __init__(self, config: str) -> None:
        self._config = config

    def on_fit_start(self, trainer: Trainer) -> None:
        everyone = trainer.strategy.compare(re.sub(r" *run_dir: .*", "", self._config))
        if len(set(everyone)) > 1:
            lines = [set(config.splitlines()) for config in everyone]
            differing = sorted(set().union(*lines) - set.intersection(*lines))
            raise UserError(f"processes were started with different options: {'; '.join(map(str.strip, differing))}.")
        if trainer.run_folder is None:
            return
        folder = trainer.run_folder.path
        with writing(f"run_dir={str(folder)!r}"):
            replace_text(folder / "config.yaml", self._config)
            if folder.parent.name == "runs":
                for link in (folder.parent / "latest", folder.parent / _link_of_this_start().name):
                    if link.is_symlink() or not link.is_dir():  # no run's folder has that name
                        new = folder.parent / f".latest-{folder.name}"
                        new.unlink(missing_ok=True)
                        new.symlink_to(folder.name)
                        new.replace(link)


def _load(text: str) -> Any:
    """A file of options is TOML or YAML; a value on the command line is YAML, as in {0: 8, 4: 4}."""
    try:
        try:
            is_list = re.fullmatch(r"\s*\[[^=\n]*\]\s*", text)  # [csv] is also TOML: the name of an empty table
            loaded: Any = yaml.safe_load(text) if is_list else tomllib.loads(text)
        except tomllib.TOMLDecodeError as no_toml:
            try:
                loaded = yaml.safe_load(text)
            except yaml.YAMLError as no_yaml:
                why = " ".join(str(no_yaml).split())
                raise yaml.YAMLError(f"this is neither TOML ({no_toml}) nor YAML ({why}).") from no_yaml
        return _with_init_args(loaded, iter(range(MOST_VALUES)))
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None


TOO_DEEP = "expected options, found brackets or aliases nested too deeply. Write the options out."
MOST_VALUES = 100_000


def _with_init_args(content: Any, budget: Iterator[int]) -> Any:
    """Return `content` with the options that stand beside a `class_path` in its `init_args`, where the parser looks.

    Raises RecursionError for more values than `budget` has numbers, aliases written out.
    """
    if next(budget, None) is None:
        raise RecursionError
    if isinstance(content, list):
        return [_with_init_args(part, budget) for part in content]
    if not isinstance(content, dict):
        return content
    parts = {name: _with_init_args(part, budget) for name, part in content.items()}
    if "class_path" not in parts or not isinstance(inner := parts.get("init_args", {}), dict):
        return parts
    kept = {name: parts.pop(name) for name in ("class_path", "dict_kwargs") if name in parts}
    parts.pop("init_args", None)
    return {**kept, "init_args": {**parts, **inner}} if parts or inner else kept


def _refuse(error: BaseException) -> int:
    """Print what is wrong, once, and return its status: process 0 does, and another one if it is still there later."""
    status = next(status for kind, status in STATUSES.items() if isinstance(error, kind))
    rank, processes = 0, 1
    with suppress(UserError):  # the environment may not say
        rank, processes = started_rank(), started_processes()
    has_lost_another = isinstance(error, ProcessFailureError)
    line = f"engine/run.py: {' '.join(describe(error).partition(': ')[2].split())}"
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    # torchrun ends all, with the status of the first that failed: one that has only lost another lets it be the first
    if processes > 1 and (rank != 0 or has_lost_another):
        end = time.monotonic() + PATIENCE * (1.5 if has_lost_another else 1)
        while time.monotonic() < end and not COMMAND.stop_requested:
            time.sleep(0.05)
    if rank != 0 and not COMMAND.stop_requested:
        print(line, file=sys.stderr, flush=True)
    return status
