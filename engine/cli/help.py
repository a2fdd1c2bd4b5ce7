"""Help: the options by section, with their defaults."""

import re
import shutil
import textwrap
from argparse import Action
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from engine.cli.modes import options
from engine.settings import OPTIONS, SECTIONS

INTRODUCTION = """\
Trains a task with exact gradient accumulation, on one process or on many:

  python engine/run.py                           a first run: handwritten digits
  python engine/run.py --plan --plan.processes=64
  torchrun --nproc_per_node=4 engine/run.py --task=line.Line --trainer.max_epochs=12
      --trainer.callbacks=engine.GradientAccumulationScheduler
      --trainer.callbacks.scheduling='{0: 8, 4: 4, 8: 1}'
"""

START = {
    "--task=CLASS": "The Task to train, by its class path; its own options are --task.NAME=VALUE",
    "--config=FILE": "A TOML or YAML file of these options; options after it win",
    "--print_config": "Print all options and their values as such a file, and end",
}
FIRST = (
    *("--task=CLASS", "--config=FILE", "micro_batch_size", "accumulate_grad_batches", "effective_batch_size"),
    *("callbacks", "max_epochs", "strategy", "precision", "run_dir", "--plan", "--check"),
)
"""The options that people use most."""

CLASSES = "The options of a class: --task.help=CLASS, --trainer.strategy.help=CLASS, --trainer.callbacks.help=CLASS"


def print_help(parser: ArgumentParser) -> None:
    """Print the modes and the options of `parser`, as wide as the terminal, but no wider than is good to read."""
    width = min(shutil.get_terminal_size().columns, 110)
    actions = {action.dest: action for action in parser._actions}
    print(INTRODUCTION)
    modes = dict(map(_mode, options()._actions))
    entries = {name: _described(actions[f"trainer.{name}"]) for name in OPTIONS}
    entries |= {name: (name, text) for name, text in (START | modes).items()}
    first = [entries.pop(name) for name in FIRST]
    _section("The options used most", first, width)
    _section("Before and instead of training", [entries.pop(name) for name in START | modes if name in entries], width)
    for title in SECTIONS:
        _section(title, [entry for name, entry in entries.items() if OPTIONS[name].section == title], width)
    print(textwrap.fill(CLASSES, width, break_on_hyphens=False))


def _section(title: str, entries: Iterable[tuple[str, str]], width: int) -> None:
    """Print options with their texts beside them, or below them if the terminal is narrow."""
    print(textwrap.fill(title, width))
    indent = " " * (38 if width >= 72 else 6)
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
