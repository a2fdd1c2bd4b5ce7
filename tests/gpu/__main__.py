"""The command of tests/gpu/run.sh: `python -m tests.gpu FOLDER [cuda|cpu]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.gpu.report import Part, run_parts

STRATEGIES = ("single", "dp", "ddp", "fsdp")


def parts(device: str) -> list[Part]:
    """Return the parts: 8 minutes at most on a GPU, and a small version of each on a CPU."""
    python, is_gpu = [sys.executable], device == "cuda"
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device/test_device.py"]
    some = [] if is_gpu else ["-k", "one_big_batch or made_of_python"]
    kit = [*python, "-m", "engine.conformance"]
    few = [] if is_gpu else ["--accumulate", "2", "--only", "gradient", "setup"]
    own = [*python, "-m", "tests.gpu.parts"]
    sizes = [] if is_gpu else ["smallest"]
    checks = [[*kit, name, "--processes", "1", *few] for name in STRATEGIES[: None if is_gpu else 1]]
    all_parts = [
        Part("device tests", [[*pytest, *(["-n", "4"] if is_gpu else []), *some]], 150),
        Part("conformance of each strategy", checks, 80),
        Part("host-device syncs per update", [[*own, "syncs"]], 40),
        Part("two processes on one device", [[*own, "two", device]], 50),
        Part("trace of one window", [[*own, "trace", device, *sizes]], 40),
        Part("speed and memory", [[*python, "tests/benchmarks/gpu.py", device, *sizes]], 120),
    ]
    return all_parts if is_gpu else [part._replace(limit=300) for part in all_parts]  # a CPU has other work, too


if __name__ == "__main__":
    folder, device = Path(sys.argv[1]), (sys.argv[2:] or ["cuda"])[0]
    os.environ["TALLY_TEST_DEVICE"] = "cuda" if device == "cuda" else "fake"
    os.environ["TALLY_GPU_FOLDER"] = str(folder)
    if device != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(run_parts(parts(device), folder, device))
