"""torchrun, but quiet where a process has already said what is wrong (engine/run.py's exit status 2)."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REFUSED = 2

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's report of other failures says the same, and more
    try:
        main()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != REFUSED:
            raise
        sys.exit(REFUSED)
