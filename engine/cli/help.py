"""What `--help` prints: the options by what they are about, with their defaults, for somebody who sees them first."""

from __future__ import annotations

import re
import shutil
import textwrap
from argparse import Action
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from engine.cli.modes import options

INTRODUCTION = """\
Trains a task with exact gradient accumulation, on one process or on many:

  python engine/run.py                           a first run: handwritten digits
  python engine/run.py --plan --plan.processes=64
  torchrun --nproc_per_node=4 engine/run.py --task=line.Line --trainer.max_epochs=12
      --trainer.callbacks=engine.GradientAccumulationScheduler
      --trainer.callbacks.scheduling='{0: 8, 4: 4, 8: 1}'
"""

START = {
    "--task=CLASS": "what to train: a Task by its class path; its own options are --task.NAME=VALUE",
    "--config=FILE": "a TOML or YAML file of all these options; those after it win",
    "--print_config": "print such a file, with all that was given, and end",
}

CLASSES = "The options of a class: --task.help=CLASS, --trainer.strategy.help=CLASS, --trainer.callbacks.help=CLASS"

SECTIONS = {
    "Windows: P processes x K micro-batches x N samples make one update": (
        "micro_batch_size",
        "accumulate_grad_batches",
        "effective_batch_size",
        "callbacks",
        "spread_windows",
    ),
    "Where the run ends": ("max_epochs", "max_updates", "max_time"),
    "Processes and precision": ("strategy", "precision", "deterministic", "tf32"),
    "Updates and order": (
        "gradient_clip_norm",
        "skip_nonfinite_updates",
        "stop_after_n_skipped",
        "seed",
        "shuffle",
    ),
    "The run's folder, and going on with it": (
        "run_dir",
        "resume",
        "resume_with_changes",
        "weights",
        "save_every_n_updates",
        "save_every_n_minutes",
        "keep_last_checkpoints",
        "keep_best",
    ),
    "Validation": ("validate_every_n_epochs", "validate_every_n_updates", "max_validation_samples"),
    "Loading data": ("num_workers", "pin_memory", "persistent_workers", "prefetch_to_device"),
    "What is told": ("progress", "loggers"),
}
"""The trainer's options by subject; those that no section names come last."""


def print_help(parser: ArgumentParser) -> None:
    """Print the modes and the options of `parser`, as wide as the terminal, but no wider than is good to read."""
    width = min(shutil.get_terminal_size().columns, 110)
    trainer = {a.dest.removeprefix("trainer."): a for a in parser._actions if a.dest.startswith("trainer.")}
    own = {name: action for name, action in trainer.items() if not name.endswith(".help")}
    print(INTRODUCTION)
    _section("What to train", START.items(), width)
    _section("Instead of training", map(_mode, options()._actions), width)
    for title, names in SECTIONS.items():
        _section(title, (_described(own.pop(name)) for name in names if name in own), width)
    if own:
        _section("More", map(_described, own.values()), width)
    print(textwrap.fill(CLASSES, width, break_on_hyphens=False))


def _section(title: str, entries: Iterable[tuple[str, str]], width: int) -> None:
    """Print options with their texts beside them, or below them where the terminal is narrow."""
    print(textwrap.fill(title, width))
    indent = " " * (40 if width >= 72 else 6)
    for option, text in entries:
        first, lines = f"  {option}", textwrap.wrap(text, width - len(indent), break_on_hyphens=False)
        if width >= 72:
            first = f"{first:<{len(indent)}}{lines.pop(0)}"
        print("\n".join([first, *(indent + line for line in lines)]))
    print()


def _mode(action: Action) -> tuple[str, str]:
    return f"{action.option_strings[-1]}{'=' + str(action.metavar) if action.metavar else ''}", str(action.help)


def _described(action: Action) -> tuple[str, str]:
    default = str(action.default).lower() if isinstance(action.default, bool) else action.default
    stated = "" if default is None else f" (default: {default})"
    text = re.sub(r"\bNone\b", "null", str(action.help).replace("`", ""))
    return action.option_strings[0], text.rstrip(".") + stated
