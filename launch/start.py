"""torchrun, but quiet where a process has already said what is wrong (2) or that it was interrupted and saved (75)."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

ALREADY_TOLD = (2, 75)
"""Exit statuses of engine/run.py."""

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's report of other failures says the same, and more
    try:
        main()
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status not in ALREADY_TOLD:
            raise
        sys.exit(status)
    except SignalException:  # torchrun itself was told to stop, and has let its processes save
        sys.exit(ALREADY_TOLD[-1])
