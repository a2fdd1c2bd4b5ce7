"""The command line: `torchrun --nproc_per_node=P engine/run.py [--config FILE] [--dotted.option VALUE ...]`.

Installed it is `tally [...]` or, for torchrun, `-m engine.run [...]`.
"""

import os
import signal
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("engine", "strategies", "launch")


def _refuse_if_hidden() -> None:
    """End with a message if one of our packages was imported from another folder."""
    for name in OURS:
        file = str(__import__(name).__file__)
        if Path(file).resolve().parent != ROOT / name:
            sys.exit(
                f"engine/run.py: another package called '{name}' hides ours: {file} was imported instead of "
                f"{ROOT / name}. Uninstall it, or use a virtual environment of its own."
            )


def _refuse_if_mixed(error: ImportError) -> None:
    """End with a message if another distribution has put its files into one of our packages."""
    name = (error.name or "").split(".")[0]
    if name in OURS:
        owners = " and ".join(sorted(set(packages_distributions().get(name, []))))
        sys.exit(
            f"engine/run.py: {ROOT / name} has files of another package ({error}). Owner: {owners or 'none'}. "
            "Install tally-engine again in a virtual environment of its own."
        )


def _end(number: int, frame: object) -> None:
    """End at once where nothing can be lost yet: while modules are imported. See engine.signals.Command."""
    if number != signal.SIGUSR1:
        os._exit(75)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if sys.path[0] == str(ROOT / "engine"):  # a script's own folder comes first: its modules would hide the user's
        del sys.path[0]
    sys.path[:0] = [str(ROOT), os.getcwd()]
    try:
        _refuse_if_hidden()
        from engine.cli.main import main
        from engine.output import Output
    except ImportError as error:
        _refuse_if_mixed(error)
        raise

    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.exit(main())
