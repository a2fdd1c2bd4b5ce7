"""torchrun, but quiet where a process has already said what is wrong (2) or that it was interrupted and saved (75)."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REFUSED, SAVED = 2, 75
"""Exit statuses of engine/run.py."""

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's report of other failures says the same, and more
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        os.environ["TALLY_SAVED"] = str(saved)
        try:
            main()
        except ChildFailedError as error:
            status = error.get_first_failure()[1].exitcode
            if status not in (REFUSED, SAVED):
                raise
            sys.exit(status)
        except SignalException as error:  # torchrun itself was told to stop, and has waited for its processes
            sys.exit(SAVED if saved.exists() else 128 + error.sigval)
