"""Learning rates that move once per epoch or by validation; those that move once per update are the task's."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.callbacks.base import Callback, Trainer, check_has_validation
from engine.errors import UserError
from engine.records.metric import MetricRule


class EpochLR(Callback):
    """Moves one of torch's LR schedulers at the end of each epoch: `EpochLR(lambda optimizer: StepLR(optimizer, 3))`.

    Raises UserError if the task has an LR scheduler too.
    """

    def __init__(self, make: Callable[[Optimizer], LRScheduler]) -> None:
        self._make = make
        self._scheduler: Any = None
        self._saved: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.lr_scheduler is not None:
            both = f"{type(self).__name__} and the task's {type(trainer.lr_scheduler).__name__}"
            raise UserError(f"{both} both set the learning rate. Use only one.")
        groups = trainer.optimizer.param_groups
        before = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self._scheduler = self._make(trainer.optimizer)
        if self._saved:
            self._scheduler.load_state_dict(self._saved)
            for group, values in zip(groups, before, strict=True):  # its constructor has changed what was resumed
                group.update(values)
            self._saved = {}

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state


class PlateauLR(EpochLR):
    """Multiplies the learning rate by `factor` after more than `patience` validations without a better `metric`.

    It is torch's ReduceLROnPlateau. Raises UserError as `EpochLR` does, and for a metric that is missing.
    """

    def __init__(
        self,
        metric: str = "loss",
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        self._rule = MetricRule("PlateauLR", f"{mode}:{metric}")
        if not 0 < factor < 1:
            raise UserError(f"PlateauLR(factor={factor!r}): give a number between 0 and 1.")
        how: Any = {"mode": mode, "factor": factor, "patience": patience, "threshold": threshold}
        super().__init__(lambda optimizer: ReduceLROnPlateau(optimizer, **how, cooldown=cooldown, min_lr=min_lr))

    def on_fit_start(self, trainer: Trainer) -> None:
        check_has_validation(trainer, self)
        super().on_fit_start(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Wait for a validation."""

    def on_validation_end(self, trainer: Trainer) -> None:
        self._scheduler.step(self._rule.value(trainer.metrics))
