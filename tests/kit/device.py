"""The device of the device tests: `fake`, which is made of Python, or the one that TALLY_TEST_DEVICE names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.kit.processes import run
from tests.kit.reference import Regression, Watch

DEVICE = os.environ.get("TALLY_TEST_DEVICE", "fake")


def there(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a process that has the device."""
    return run(1, _there, function, args, group=False, seconds=100, fresh=True)[0]


def _there(function: Callable[..., Any], args: Any) -> Any:
    if DEVICE == "fake":
        from tests.kit import fake_device  # noqa: F401
    return function(*args)


class Unseen(Regression):
    """The regression, its loss without a look at the samples' numbers."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(model(batch[0]), batch[1])


class Looks(Watch):
    """Counts where the host waits for the device, update by update."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[int] = []

    def on_fit_start(self, trainer: Any) -> None:
        if DEVICE == "cuda":
            self.caught = warnings.catch_warnings(record=True)
            self.seen: Any = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            from tests.kit import fake_device

            self.seen = fake_device.waits

    def on_update_end(self, trainer: Any) -> None:
        super().on_update_end(trainer)
        self.looks.append(self.count())

    def count(self) -> int:
        """Return how often since the last time."""
        waits = [wait for wait in self.seen if DEVICE != "cuda" or "synchronizing CUDA operation" in str(wait.message)]
        self.seen.clear()
        return len(waits)

    def on_fit_end(self, trainer: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
