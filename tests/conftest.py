import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share two cores

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script, and so by the engine
settings.register_profile("tally", deadline=None)  # no test measures time
settings.load_profile("tally")

if (device := os.environ.get("TALLY_TEST_DEVICE", "fake")) == "fake":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' processes talk over gloo
elif device == "cuda":
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_device.py"]
else:
    raise ValueError(f"TALLY_TEST_DEVICE={device}: give cuda, or leave it out.")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Undo what a command that ran in this process has done: it ends with its signals ignored."""
    handlers = {number: signal.getsignal(number) for number in (1, 2, 10, 15)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
