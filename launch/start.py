"""torchrun, but quiet where a process has already said what is wrong (2) or that it was interrupted and saved (75)."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REFUSED, SAVED = 2, 75
"""Exit statuses of engine/run.py."""


def meet_in_a_file(path: Path) -> None:
    """Replace `--standalone`: its store listens on all interfaces, and its agent unpickles what anybody puts there."""
    path.touch(0o600)
    place = sys.argv.index("--standalone")
    meeting = ("--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={path}")
    sys.argv[place : place + 1] = [*meeting, f"--rdzv-id={uuid.uuid4().hex}", "--nnodes=1"]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's report of other failures says the same, and more
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        os.environ["TALLY_SAVED"] = str(saved)
        if "--standalone" in sys.argv:
            meet_in_a_file(Path(folder, "meeting"))
        try:
            main()
        except ChildFailedError as error:
            status = error.get_first_failure()[1].exitcode
            if status not in (REFUSED, SAVED):
                raise
            sys.exit(status)
        except SignalException as error:  # torchrun itself was told to stop, and has waited for its processes
            sys.exit(SAVED if saved.exists() else 128 + error.sigval)
