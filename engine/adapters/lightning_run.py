"""The run as a module written for Lightning sees it: its `trainer`, its hooks and its LR schedulers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from engine.callbacks import Callback
from engine.errors import UserError

STEPS = ("training_step", "validation_step")
TRANSFERS = ("on_before_batch_transfer", "on_after_batch_transfer")
WAYS_OUT = {
    "backward": "the engine calls it. Write the loop with Accumulator",
    "configure_gradient_clipping": "use Trainer(gradient_clip_norm=...)",
    "configure_sharded_model": "rename it to configure_model",
    "optimizer_step": "the engine steps. Use on_before_optimizer_step, or write the loop with Accumulator",
    "optimizer_zero_grad": "the engine clears gradients after each update. Leave it out",
    "transfer_batch_to_device": "give the batch a method to(device)",
    **dict.fromkeys(("on_before_zero_grad", "on_load_checkpoint", "on_save_checkpoint"), "use a callback of engine"),
    **{f"on_validation_model_{what}": "use a callback of engine" for what in ("eval", "train", "zero_grad")},
}
"""Hooks that are not called, with what to do instead. Lightning's other hooks are called at the same places."""
BASES = ("torch.", "builtins.", "lightning.pytorch.core.", "lightning.fabric.", "pytorch_lightning.core.")


def refuse(what: str, instead: str) -> NoReturn:
    """Raise UserError for what cannot be carried over."""
    raise UserError(f"{what} cannot be carried over from Lightning: {instead}.")


def defines(thing: object, name: str) -> bool:
    """Whether a class of the user or of a demo has the method, not a base class of Lightning or torch."""
    owner = next((owner for owner in type(thing).__mro__ if name in vars(owner)), object)
    return not f"{owner.__module__}.".startswith(BASES)


FACTS: dict[str, Callable[[Any], Any]] = {
    "callback_metrics": lambda run: {name: torch.tensor(value) for name, value in run.metrics.items()},
    "current_epoch": lambda run: run.epoch,
    "datamodule": lambda run: run.task.datamodule,
    "estimated_stepping_batches": lambda run: (
        run.task.total_updates
        or refuse("estimated_stepping_batches of a stream", "use Trainer(max_updates=...), or a map-style dataset")
    ),
    "global_rank": lambda run: run.strategy.rank,
    "global_step": lambda run: run.update,
    "is_global_zero": lambda run: run.strategy.rank == 0,
    "local_rank": lambda run: run.strategy.local_rank,
    "max_epochs": lambda run: run.settings.max_epochs or -1,
    "max_steps": lambda run: run.settings.max_updates or -1,
    "optimizers": lambda run: [run.optimizer],
    "world_size": lambda run: run.strategy.processes,
    **dict.fromkeys(("logger", "progress_bar_callback"), lambda run: None),
    **dict.fromkeys(("sanity_checking", "should_stop"), lambda run: False),
}
"""Attributes of the module's `trainer`."""


class View:
    """The module's `trainer`: what a run can tell. Any other use raises UserError."""

    def __init__(self, run: Any = None) -> None:
        vars(self)["_run"] = run

    def __reduce__(self) -> Any:
        return View, ()  # a copy, such as a worker's, has no run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FACTS:
            refuse(f"self.trainer.{name}", "a callback of engine.callbacks has the trainer")
        if self._run is None:
            refuse(f"self.trainer.{name} before fit", "ask for it in a hook, a step or configure_optimizers")
        return FACTS[name](self._run)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "should_stop" or self._run is None:
            refuse(f"self.trainer.{name} = {value!r}", "give it to Trainer")
        self._run.stop()


class Hooks(Callback):
    """Calls a module's hooks where Lightning calls them, moves its LR schedulers, and records what hooks log.

    What they log of an update is in its record, as process 0 has it. What they log of a validation is in its record,
    and at an epoch's end in `trainer.metrics` and the next record: the mean over processes.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        hooks = [name for name in dir(type(module)) if name.startswith("on_") or name == "teardown"]
        self._hooks = {name: getattr(module, name) for name in hooks if defines(module, name)}
        self._schedulers: list[dict[str, Any]] = []
        self._logged: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}  # objects that training has logged in this epoch
        self._results: dict[str, float] = {}  # of the last validation
        self._ended: tuple[Any, ...] | None = None  # outputs, batch and index of the micro-batch in backward
        self._index = dict.fromkeys(STEPS, 0)
        self._saved_index = 0

    def _call(self, hook: str, *arguments: Any) -> None:
        if hook in self._hooks:
            self._hooks[hook](*arguments)

    def _end_batch(self) -> None:
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self._call("on_train_batch_end", *ended)

    def on_fit_start(self, trainer: Any) -> None:
        self._index["training_step"] = self._saved_index
        self._call("on_fit_start")
        self._call("on_train_start")

    def on_epoch_start(self, trainer: Any) -> None:
        self._index["training_step"] = 0
        self._call("on_train_epoch_start")

    def on_gradients(self, trainer: Any) -> None:
        if self._ended is not None:
            self._call("on_after_backward")
        self._call("on_before_optimizer_step", trainer.optimizer)

    def on_update_end(self, trainer: Any) -> None:
        self._move("step", trainer.update, trainer.metrics)
        self._end_batch()
        self._saved_index = self._index["training_step"]
        if self._logged:
            trainer.record.update({name: float(value) for name, value in self._logged.items()})
            self._logged = {}

    @contextmanager
    def around_validation(self, trainer: Any) -> Iterator[None]:
        self._index["validation_step"] = 0
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        with torch.no_grad():
            self._call("on_validation_start")
            self._call("on_validation_epoch_start")
            yield
            self._call("on_validation_epoch_end")
            self._results = self._gathered(trainer)
            trainer.metrics.update(self._results)
            self._call("on_validation_end")
        for part, was_training in modes.items():
            part.training = was_training

    def on_validation_end(self, trainer: Any) -> None:
        trainer.metrics.update(self._results)
        if not trainer.metrics:
            raise UserError("validation_step logged nothing and returned nothing: call self.log(name, mean) in it.")

    def on_epoch_end(self, trainer: Any) -> None:
        self._call("on_train_epoch_end")
        self._logged |= self._metrics
        self._metrics = {}
        self._logged = self._gathered(trainer)
        trainer.metrics.update(self._logged)
        self._move("epoch", trainer.epoch + 1, trainer.metrics)

    def on_fit_end(self, trainer: Any) -> None:
        if trainer.state.finished_epoch != trainer.state.started_epoch:  # Lightning ends an epoch that has stopped, too
            self._call("on_train_epoch_end")
        self._call("on_train_end")
        self._call("on_fit_end")
        self._call("teardown", "fit")

    def _move(self, interval: str, count: int, metrics: dict[str, float]) -> None:
        """Move the LR schedulers that are due after `count` updates or epochs."""
        for config in self._schedulers:
            if config["interval"] != interval or count % config["frequency"]:
                continue
            scheduler, values = config["scheduler"], []
            if isinstance(scheduler, ReduceLROnPlateau):
                if config["monitor"] not in metrics:
                    refuse(f"ReduceLROnPlateau with monitor={config['monitor']!r}", f"use one of {sorted(metrics)}")
                values = [metrics[config["monitor"]]]
            if defines(self.module, "lr_scheduler_step"):
                self.module.lr_scheduler_step(scheduler, values[0] if values else None)
            else:
                scheduler.step(*values)

    def _gathered(self, trainer: Any) -> dict[str, float]:
        """Return what was logged on all processes: results of metric objects, which are reset, and means of numbers."""
        logged, self._logged = self._logged, {}
        rows = trainer.strategy.gather({name: _on_host(value) for name, value in logged.items()})
        for metric in logged.values():
            if hasattr(metric, "reset"):
                metric.reset()
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _joined([row[name] for row in rows if name in row]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._saved_index, "schedulers": [c["scheduler"].state_dict() for c in self._schedulers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_index = state["index"]
        for config, saved in zip(self._schedulers, state["schedulers"], strict=False):  # none for a validation
            config["scheduler"].load_state_dict(saved)


def _on_host(value: Any) -> Any:
    return deepcopy(value).to("cpu") if hasattr(value, "compute") else float(value)


def _joined(values: list[Any]) -> float:
    if isinstance(values[0], float):
        return float(sum(values) / len(values))
    values[0].sync_on_compute = False  # torchmetrics would wait for the other processes
    for other in values[1:]:
        values[0].merge_state(other)
    return float(values[0].compute())
