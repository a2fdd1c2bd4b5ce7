"""torchrun, but with the exit status of the run, and quiet where a process has already said in a line what is wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from types import FrameType

SAVED, LOST = 75, 76
SAID = (2, 70, 74, SAVED, LOST)
"""Exit statuses of engine/run.py after which nothing more is to be said."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def _leave(number: int, frame: FrameType | None) -> None:
    """End before there are processes: nothing can be lost yet."""
    os._exit(SAVED)


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Stop once: a second signal would break off the wait for processes that save."""
    from torch.distributed.elastic.multiprocessing import SignalException

    _ignore()
    raise SignalException(f"launch.start got signal {signum}", signal.Signals(signum))


def meet_in_a_file(path: Path) -> None:
    """Replace `--standalone`: its store listens on all interfaces, and its agent unpickles what anybody puts there."""
    path.touch(0o600)
    place = sys.argv.index("--standalone")
    meeting = ("--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={path}")
    sys.argv[place : place + 1] = [*meeting, f"--rdzv-id={uuid.uuid4().hex}", "--nnodes=1"]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _kept(path: Path, number: int) -> int:
    """Return the status that a run has left, that of one that had not begun, or that of an end by signal `number`."""
    return int(path.read_text() or SAVED) if path.exists() else 128 + number


def main() -> int:
    """Be torchrun, and return the status of the run."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)  # until torchrun has its own
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the processes of the run heed it all the same

    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    api._terminate_process_handler = _stop
    logging.disable(logging.ERROR)  # torchrun's report of other failures says the same, and more
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "status")
        kept.touch()  # a run that begins to train removes it, and leaves its own status at its end
        os.environ["TALLY_STATUS"] = str(kept)
        if "--standalone" in sys.argv:
            meet_in_a_file(Path(folder, "meeting"))
        try:
            try:
                torchrun()
                status = 0
            except ChildFailedError as error:
                status = error.get_first_failure()[1].exitcode
                if -status in ENDING:  # before the first line of engine/run.py, which heeds signals
                    status = _kept(kept, -status)
                status = LOST if status == -signal.SIGKILL else status
                if status not in SAID and status < 128:
                    raise
            _ignore()
        except SignalException as error:  # torchrun itself was told to stop, and has waited for its processes
            status = _kept(kept, error.sigval)
    return status


if __name__ == "__main__":
    sys.exit(main())
