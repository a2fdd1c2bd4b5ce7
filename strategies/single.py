"""One process, one device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from strategies.base import Strategy
from strategies.environment import started_processes
from strategies.errors import UserError

NOTHING_TO_DEFER = nullcontext()


class SingleDeviceStrategy(Strategy):
    """Train on one device: `device`, else CUDA if available, else the CPU. Gradients add up."""

    name = "single"
    supports_variable_windows = True
    supports_redo = True

    def __init__(self, device: str | None = None) -> None:
        self._device = None if device is None else torch.device(device)

    def effective_batch(self, N: int, K: int) -> int:
        return N * K

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Return a context that does nothing: there is no communication to defer."""
        return NOTHING_TO_DEFER

    def own_norm(self) -> Tensor:
        return super().clip(None)

    @property
    def device(self) -> torch.device:
        if self._device is None:
            self._device = super().device
        return self._device

    def setup(self) -> None:
        """Raise UserError if several processes were started: each would train a model of its own."""
        if (processes := started_processes()) > 1:
            raise UserError(
                f"strategy={self.name!r}: expected one process, but {processes} were started. Use "
                "--trainer.strategy=ddp, or start one process."
            )
