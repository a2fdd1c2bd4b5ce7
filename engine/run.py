"""The command line: `torchrun --nproc_per_node=P engine/run.py [--config FILE] [--dotted.option VALUE ...]`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    if sys.path[0] == str(ROOT / "engine"):  # a script's own folder comes first: its modules would hide the user's
        sys.path[:1] = [str(ROOT), os.getcwd()]

    import engine

    if Path(str(engine.__file__)).resolve().parent != ROOT / "engine":
        sys.exit(
            f"engine/run.py: another package called 'engine' hides ours: {engine.__file__} was imported instead of "
            f"{ROOT / 'engine'}. Uninstall it, or use a virtual environment of its own."
        )

    from engine.command import main

    sys.exit(main())
