"""The trained model, written by its own library."""

from typing import Any

from engine.callbacks.base import Callback, Trainer
from engine.errors import UserError


class SavePretrained(Callback):
    """Writes the model by its own `save_pretrained` into `run_dir/pretrained`. Raises UserError if one is missing."""

    def on_fit_start(self, trainer: Trainer) -> None:
        if not hasattr(trainer.model, "save_pretrained") or trainer.settings.run_dir is None:
            what = f"a {type(trainer.model).__name__} and run_dir={trainer.settings.run_dir!r}"
            raise UserError(f"SavePretrained: expected a model with save_pretrained(), and a run_dir, found {what}.")

    def on_fit_end(self, trainer: Trainer) -> None:
        model: Any = trainer.model
        trainer.strategy.left_out = ()  # the library chooses what it writes
        state = trainer.strategy.state_dict()["model"]
        if trainer.run_folder is not None:
            model.save_pretrained(trainer.run_folder.path / "pretrained", state_dict=state)
