"""Parts of the command for a GPU: `python -m tests.gpu.parts syncs|two|trace [cuda|cpu] [SIZE]`. Each prints JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine import Callback, Trainer
from strategies import DDPStrategy, SingleDeviceStrategy
from tests.benchmarks.gpu import SIZES, Language
from tests.kit.device import DEVICE, Looks, Unseen, there
from tests.kit.processes import ChildError, run
from tests.kit.reference import Regression, big_batch_run, in_order, parameters

N, K = 2, 3
GAP = 50.0
"""Microseconds: a shorter pause of the device is one between two kernels."""


def syncs() -> dict[str, Any]:
    """Return how often the host waits for the device in an update, for two K."""
    return {str(k): there(syncs_of, k) for k in (8, 64)}


def syncs_of(k: int) -> list[int]:
    looks = Looks()
    trainer = Trainer(SingleDeviceStrategy(DEVICE), N, k, max_updates=4, gradient_clip_norm=1.0, callbacks=looks)
    trainer.fit(Unseen(4 * k * N))
    return looks.looks[1:]  # before the first, the model is moved


def two(device: str) -> dict[str, Any]:
    """Train on two processes that share the device. Raises AssertionError unless they train what one big batch does."""
    said = {}
    samples = 4 * N * K + 1
    for backend in ("nccl", "gloo") if device == "cuda" else ("gloo",):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = run(
                    2, fit_two, backend, device, f"{folder}/store", samples, group=False, seconds=40, fresh=True
                )
            except ChildError as error:
                if backend == "gloo":
                    raise
                said[backend] = f"refused: {next(iter(error.errors.values()))[:200]}"
                continue
        expected = big_batch_run(Regression(samples), [in_order(samples, 2 * N * K)] * 2)
        for values in found:
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
        said[backend] = "what one big batch trains, to 1e-12"
    return said


def fit_two(backend: str, device: str, store: str, samples: int) -> Any:
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    limit = timedelta(seconds=20)
    dist.init_process_group(backend, store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
    strategy: Any = DDPStrategy(device=device)  # type: ignore[arg-type]
    trainer = Trainer(strategy, N, K, max_epochs=2, shuffle=False)
    trainer.fit(Regression(samples))
    return parameters(trainer.model).cpu()


class Traces(Callback):
    """Profiles the third update, and writes the trace into `folder`."""

    def __init__(self, device: str) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profile = profile(activities=kinds)

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == 2:
            self.profile.start()
        elif trainer.update == 3:
            self.profile.stop()


def trace(device: str, name: str = "GPT-2") -> dict[str, Any]:
    """Return how busy the device is from the first kernel of a window to the last one before the optimizer's step."""
    size = SIZES[name]
    traces = Traces(device)
    trainer = Trainer("single", size.N, size.K, max_updates=3, precision="bf16", callbacks=traces)
    trainer.fit(Language(size._replace(updates=3)))
    file = Path(os.environ.get("TALLY_GPU_FOLDER", ".")) / "trace.json"
    traces.profile.export_chrome_trace(str(file))
    events = list(traces.profile.events() or [])
    step = min(event.time_range.start for event in events if event.name.startswith("Optimizer.step"))
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind and event.time_range.start < step and not event.name.startswith("Optimizer.")
    )
    busy, gaps, until = 0.0, [], spans[0][0]
    for start, end in spans:
        if start - until > GAP:
            gaps.append(start - until)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "micro-batches": size.K,
        "window (us)": round(until - spans[0][0]),
        "busy share": round(busy / (until - spans[0][0]), 4),
        f"gaps over {GAP:.0f} us": len(gaps),
        "longest gap (us)": round(max(gaps, default=0.0), 1),
        "most frequent": Counter(e.name for e in events if e.device_type == kind).most_common(1)[0][0][:80],
        "file": file.name,
    }


if __name__ == "__main__":
    print(json.dumps({"syncs": syncs, "two": two, "trace": trace}[sys.argv[1]](*sys.argv[2:])))
