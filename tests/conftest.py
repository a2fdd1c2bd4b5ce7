import os
import signal

if os.environ.get("TALLY_TEST_DEVICE") != "cuda":  # test_device.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' processes talk over gloo
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share two cores

import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script, and so by the engine
settings.register_profile("tally", deadline=None)  # no test measures time
settings.load_profile("tally")
