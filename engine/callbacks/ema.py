"""Averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.callbacks.base import Callback
from engine.errors import UserError
from strategies import user_name

if TYPE_CHECKING:
    from engine.trainer import Trainer


class EMA(Callback):
    """Keeps an exponential moving average of the parameters, moved once per update, and validates with it.

    After each update `average = decay * average + (1 - decay) * parameter`, starting from the parameters before the
    first. Training continues with the parameters themselves. At the end of a run with a `run_dir`,
    `model-ema.safetensors` has the model with averaged parameters. Raises UserError for a `decay` that is not between
    0 and 1, and for a strategy whose processes hold parts of the model.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"EMA(decay={decay!r}): give a number between 0 and 1.")
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.averages: dict[str, Tensor] = {}
        """The averaged parameters, by name, on their device."""
        self._model: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []
        self._saved: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin with the parameters, or with what a checkpoint had."""
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if not trainer.strategy.holds_all:
            raise UserError(f"EMA needs whole parameters on each process, which {trainer.strategy.name} does not have.")
        named = {user_name(n): p for n, p in trainer.model.named_parameters() if p.requires_grad}
        self._model, self._parameters = trainer.model, list(named.values())
        self.averages = {n: self._saved.get(n, p).detach().to(p.device, copy=True) for n, p in named.items()}
        self._saved = {}

    def on_update_end(self, trainer: Trainer) -> None:
        """Move the average."""
        self._move(list(self.averages.values()), self._parameters, None)

    @contextmanager
    def around_validation(self, trainer: Trainer) -> Iterator[None]:
        """Validate with the average."""
        if self._model is not trainer.model:  # without a fit
            self._begin(trainer)
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write the averaged model."""
        if trainer.run_folder is not None:
            with self.around_validation(trainer):
                trainer.run_folder.save_weights(trainer.strategy.state_dict()["model"], "model-ema.safetensors")

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return dict(self.averages)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them for `on_fit_start`."""
        self._saved = state
