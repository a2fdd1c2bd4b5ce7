"""Rollback: the state that forward changes before an update, kept so that a dropped window leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.update.host_rng import HostRng, HostState


class Rollback:
    """Keeps the model's buffers (BatchNorm's statistics) and the host's generators of the boundary before a window."""

    def __init__(self, model: nn.Module, seed: int, rank: int) -> None:
        self._model = model
        self._has_buffers = any(True for _ in model.buffers())
        self._buffers: dict[str, Tensor] = {}
        self._host_rng = HostRng(seed, rank)

    def begin(self, update: int) -> None:
        """Keep the state before the window of `update`."""
        if self._has_buffers:
            self._buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._host_rng.start_window(update)

    def undo(self) -> None:
        """Restore it."""
        self._host_rng.drop()
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])

    def forget_draws(self) -> None:
        """Ignore draws from the host's generators between two windows (validation, callbacks)."""
        self._host_rng.forget()

    def rng_state(self) -> HostState:
        """Return what a resumed run needs of the host's generators."""
        return self._host_rng.state()

    def load_rng_state(self, states: Sequence[HostState], rank: int, processes: int) -> None:
        """Load what all processes returned."""
        self._host_rng.load_state(states, rank, processes)
