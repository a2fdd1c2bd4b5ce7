"""Exponential moving average of the parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.callbacks.base import Callback, Trainer
from engine.errors import UserError
from strategies import user_name


class EMA(Callback):
    """Keeps an exponential moving average of the parameters, moved once per update, and validates with it.

    After each update `average = decay * average + (1 - decay) * parameter`. At the end, `model-ema.safetensors` in the
    `run_dir` has the averaged model. Raises UserError unless 0 < `decay` < 1, and for parts of a model on a process.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"EMA(decay={decay!r}): give a number between 0 and 1.")
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.averages: dict[str, Tensor] = {}
        """The averaged parameters, by name, on their device, in float32 or wider."""
        self._model: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []
        self._saved: dict[str, Tensor] = {}
        self._skipped = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin with the trained parameters, or with what a checkpoint had."""
        if not trainer.strategy.holds_model:
            raise UserError(f"EMA needs whole parameters on each process, which {trainer.strategy.name} does not have.")
        self.averages, self._parameters, self._skipped = {}, [], trainer.skipped
        self._model = trainer.model
        self.on_epoch_start(trainer)
        self._saved = {}

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Begin with parameters that were unfrozen since."""
        for name, p in ((user_name(n), p) for n, p in trainer.model.named_parameters()):
            if name in self._saved or (p.requires_grad and not self._saved and name not in self.averages):
                self._parameters.append(p)
                wide = torch.promote_types(p.dtype, torch.float32)  # the small steps of an average are lost in bfloat16
                self.averages[name] = self._saved.get(name, p).detach().to(p.device, wide, copy=True)

    def on_update_end(self, trainer: Trainer) -> None:
        """Move the average, unless the update was skipped."""
        if trainer.skipped > self._skipped:
            self._skipped = trainer.skipped
            return
        averages = list(self.averages.values())
        self._move(averages, [p.to(a.dtype) for p, a in zip(self._parameters, averages, strict=True)], None)

    @contextmanager
    def around_validation(self, trainer: Trainer) -> Iterator[None]:
        if self._model is not trainer.model:  # without a fit
            self.on_fit_start(trainer)
        values = [parameter.detach() for parameter in self._parameters]
        kept = [value.clone() for value in values]
        list(map(Tensor.copy_, values, self.averages.values()))
        try:
            yield
        finally:
            list(map(Tensor.copy_, values, kept))

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.run_folder is not None:
            with self.around_validation(trainer):
                trainer.run_folder.save_weights(trainer.strategy.state_dict()["model"], "model-ema.safetensors")

    def state_dict(self) -> dict[str, Any]:
        return dict(self.averages)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state
