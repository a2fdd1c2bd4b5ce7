"""Callbacks: hooks into a run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.trainer import Trainer as Trainer
else:
    Trainer = Any  # for annotations alone: this room stands below it


class Callback:
    """Called with the trainer at the events of a run, on every process; override what you need.

    A hook may read anything of the trainer and ask it to `stop()`. Collectives in a hook must be called on all
    processes alike. Its state, if it has any, must be the same on all processes: JSON values and tensors only.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Everything is built; no micro-batch has run."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """`trainer.epoch` starts."""

    def on_gradients(self, trainer: Trainer) -> None:
        """The gradients in `p.grad` are reduced and clipped as the step takes them; also before a skipped update."""

    def on_update_end(self, trainer: Trainer) -> None:
        """An update was made or skipped, and gradients are cleared. Numbers added to `trainer.record` are recorded."""

    def around_validation(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Return the context of a validation; it is left even if the validation is interrupted."""
        return nullcontext()

    def on_validation_end(self, trainer: Trainer) -> None:
        """`trainer.metrics` holds new results; numbers that are added to it are recorded, and may decide."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """`trainer.epoch` is over, its validation included."""

    def on_save_weights(self, trainer: Trainer) -> None:
        """The run is over and saved, and `model.safetensors` is to be written: of the model as this leaves it."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """The run is over; the process group still stands."""

    def on_interruption(self, trainer: Trainer) -> None:
        """The run was interrupted and has saved itself; called instead of `on_fit_end`."""

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        """The run ends by `exception`, which is raised again afterwards. Call no collective here."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def as_callbacks(callbacks: Any) -> list[Callback]:
    """Return one callback, or a list or tuple of them, as a list. Raises UserError for anything else."""
    if callbacks is None:
        return []
    listed = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in listed:
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks={callback!r}: expected a Callback object, or a list of them.")
    return listed


def call(trainer: Trainer, event: str) -> None:
    """Call the hook of that name on all callbacks."""
    for callback in trainer.callbacks:
        getattr(callback, event)(trainer)


@contextmanager
def around_validation(trainer: Trainer) -> Iterator[None]:
    """Enter the contexts that the callbacks put around a validation."""
    with ExitStack() as contexts:
        for callback in trainer.callbacks:
            contexts.enter_context(callback.around_validation(trainer))
        yield


def check_has_validation(trainer: Trainer, callback: Callback) -> None:
    """Raise UserError if a callback needs a validation and the task has no validation data."""
    if not trainer.has_validation:
        name, source = type(callback).__name__, f"{type(trainer.task).__name__}.validation_data()"
        raise UserError(f"{name}: expected validation data, but {source} returned None. Return data, or leave it out.")
