"""Modules written for Lightning as tasks; Lightning itself is not imported."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from engine.callbacks import EpochLR
from engine.errors import UserError
from engine.loss import Loss
from engine.task import Task

log = logging.getLogger("tally")

# Methods that change what is trained, and that the engine does not call, as all `on_...` of training and validation
NOT_CALLED = {
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "configure_model",
    "configure_sharded_model",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "transfer_batch_to_device",
}

STEPS = ("training_step", "validation_step")


class Lightning(Task):
    """Trains a module with Lightning's methods: `training_step`, `configure_optimizers`, and loaders or given data.

    `module` is a LightningModule, or any `nn.Module` with these methods; it is trained in place, from process 0's
    parameters. `train` and `validation` replace its own loaders, and are what `Task.train_data` may return. A
    DataLoader that only shuffles or reads in order gives its dataset, order and `collate_fn`; micro-batches and workers
    are the trainer's.

    `training_step` returns the mean over the micro-batch's samples, a dictionary with it as "loss", or a `Loss`. What
    `validation_step` logs, or else its loss, are the metrics; what `training_step` logs is ignored, with one warning.
    `batch_idx` counts this process's micro-batches since its start, or since the start of a validation.

    Raises UserError for what cannot be carried over: manual optimization, several optimizers or loaders, hooks,
    Lightning's callbacks, and any use of `self.trainer`.
    """

    def __init__(self, module: nn.Module, train: Any = None, validation: Any = None) -> None:
        _check_module(module)
        self.module: Any = module
        self._given = train, validation
        self._data: tuple[Any, Any] | None = None
        self._collate: Any = None
        self._in_order = 0
        self._takes = {step: _arguments(module, step) for step in STEPS if _defines(module, step)}
        self._index = dict.fromkeys(STEPS, 0)
        self._now = ""
        self._logged: dict[str, Loss | Tensor] = {}
        self._warned = False
        self._epoch_scheduler: LRScheduler | None = None
        self._has_epoch_lr = False
        attributes: Any = module
        attributes.log, attributes.log_dict, attributes.trainer = self._log, self._log_dict, _NoTrainer()

    @property
    def epoch_lr(self) -> EpochLR:
        """The callback that moves the module's LR scheduler once per epoch, if that is its interval."""
        self._has_epoch_lr = True
        return EpochLR(lambda optimizer: self._epoch_scheduler or _refuse("epoch_lr", "no scheduler moves by epoch"))

    def prepare_data(self) -> None:
        if _defines(self.module, "prepare_data"):
            self.module.prepare_data()

    def configure_model(self) -> nn.Module:
        return Steps(self.module)

    def configure_optimizer(self, model: nn.Module) -> Optimizer | tuple[Optimizer, LRScheduler]:
        optimizer, scheduler, interval = _configured(self.module.configure_optimizers())
        if scheduler is None or interval == "step":
            return optimizer if scheduler is None else (optimizer, scheduler)
        self._epoch_scheduler = scheduler
        if not self._has_epoch_lr:
            _refuse(
                f"{type(scheduler).__name__} with interval 'epoch' (Lightning's default)",
                "the task's scheduler moves once per update. Give the trainer callbacks=task.epoch_lr, or return it "
                'with "interval": "step"',
            )
        return optimizer

    def train_data(self) -> Dataset[Any] | Iterable[Any]:
        return self._loaded()[0]  # type: ignore[no-any-return]

    def validation_data(self) -> Dataset[Any] | Iterable[Any] | None:
        return self._loaded()[1] if _defines(self.module, "validation_step") else None

    def collate(self, samples: list[Any]) -> Any:
        return self._collate(samples) if self._collate is not None else super().collate(samples)

    def order(self, epoch: int) -> Sequence[int] | None:
        return range(self._in_order) if self._in_order else None

    def loss(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        self._index["validation_step"] = 0
        found = self._step(model, "training_step", batch)
        loss: Loss | Tensor = found["loss"] if isinstance(found, Mapping) else found
        return loss

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss | Tensor]:
        self._logged = {}
        found = self._step(model, "validation_step", batch)
        if not self._logged and found is None:
            raise UserError("validation_step logged nothing and returned nothing: call self.log(name, mean) in it.")
        return self._logged or (found if isinstance(found, Mapping) else {"loss": found})

    def _step(self, model: nn.Module, step: str, batch: Any) -> Any:
        self._now = step
        index = self._index[step]
        self._index[step] += 1
        return model(step, *(batch, index)[: self._takes[step]])

    def _loaded(self) -> tuple[Any, Any]:
        """Return both kinds of data, and take loaders apart, once."""
        if self._data is None:
            if _defines(self.module, "setup"):
                self.module.setup("fit")
            names = [name if _defines(self.module, name) else "" for name in ("train_dataloader", "val_dataloader")]
            own: list[Any] = [getattr(self.module, name)() if name else None for name in names]
            train, validation = (mine if given is None else given for given, mine in zip(self._given, own, strict=True))
            if train is None:
                _refuse("a module without train_dataloader", "give the data: Lightning(module, train=dataset)")
            found = [(data, _shuffles_or_reads(data)) for data in (train, validation)]
            loaders = [data for data, is_plain in found if is_plain]
            if len({loader.collate_fn for loader in loaders}) > 1:
                _refuse("two DataLoaders with different collate_fn", "use one for both")
            if loaders:
                self._collate = loaders[0].collate_fn
                log.info("DataLoader: the dataset is read; its batch_size and num_workers are the trainer's to say")
            if found[0][1] and isinstance(train.sampler, SequentialSampler):
                self._in_order = len(train.dataset)
            first, second = (data.dataset if is_plain else data for data, is_plain in found)
            self._data = first, second
        return self._data

    def _log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **options: Any) -> None:
        if self._now != "validation_step":
            if not self._warned:
                log.warning("self.log in training_step is ignored: each update's record has its loss, lr and more.")
            self._warned = True
            return
        if not isinstance(value, Tensor | Real) or (isinstance(value, Tensor) and value.numel() != 1):
            _refuse(f"self.log({name!r}, a {type(value).__name__})", "log a number: the micro-batch's mean")
        if options.get("reduce_fx", "mean") not in ("mean", torch.mean):
            _refuse(f"self.log({name!r}, reduce_fx={options['reduce_fx']!r})", "metrics are means over samples")
        mean = torch.as_tensor(value).detach().reshape(())
        self._logged[name] = mean if batch_size is None else Loss(mean * batch_size, batch_size)

    def _log_dict(self, values: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        for name, value in values.items():
            self._log(name, value, *arguments, **options)


class Steps(nn.Module):
    """A module under its own parameter names, whose forward runs a whole step, for wrappers such as DDP."""

    own: nn.Module

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "own", module)  # no submodule: the names stay
        mode = module.training
        super().__init__()
        self.training = mode
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        vars(self).update({name: vars(module)[name] for name in shared})

    def forward(self, step: str, *arguments: Any) -> Any:
        """Run the step of that name."""
        return getattr(self.own, step)(*arguments)

    @property
    def training(self) -> bool:
        """The module's own mode."""
        return self.own.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.own.training = mode

    def train(self, mode: bool = True) -> Steps:
        """Set the module's mode."""
        self.own.train(mode)
        return self

    def to(self, *arguments: Any, **options: Any) -> Steps:
        """Move the module, which may keep its device."""
        self.own.to(*arguments, **options)
        return self


class _NoTrainer:
    """The module's `trainer`: any use raises; without a trainer, `current_epoch` and `global_step` would stay 0."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f"self.trainer.{name}, which self.{name} may ask for", "a callback of engine.callbacks has the trainer")


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module) or not _defines(module, "training_step"):
        _refuse(f"{type(module).__name__}", "give an nn.Module with training_step and configure_optimizers")
    if not _defines(module, "configure_optimizers"):
        _refuse("a module without configure_optimizers", "return an optimizer from it")
    if not getattr(module, "automatic_optimization", True):
        _refuse("automatic_optimization=False", "the engine makes the updates")
    for name in dir(type(module)):
        is_hook = name.startswith("on_") and not name.startswith(("on_test", "on_predict"))
        if (is_hook or name in NOT_CALLED) and _defines(module, name):
            _refuse(f"the method {name}", "nothing would call it. Move it to a callback, or to the trainer")
    for step in STEPS:
        if _defines(module, step) and not 1 <= _arguments(module, step) <= 2:
            _refuse(f"{step} with other arguments than (batch, batch_idx)", "use one loader, and take a batch")


def _arguments(module: nn.Module, step: str) -> int:
    """Return the number of arguments that a step takes; 0 for an unsupported step."""
    parameters = inspect.signature(getattr(module, step)).parameters.values()
    if any(p.name == "dataloader_iter" for p in parameters):
        return 0
    return sum(p.default is p.empty or p.name == "batch_idx" for p in parameters)


def _defines(module: nn.Module, name: str) -> bool:
    """Whether a class of the user has the method, not one of Lightning or torch."""
    for owner in type(module).__mro__:
        if name in vars(owner):
            return owner.__module__.split(".")[0] not in ("lightning", "pytorch_lightning", "torch")
    return False


def _configured(found: Any) -> tuple[Optimizer, LRScheduler | None, str]:
    """Return the one optimizer, its scheduler if any, and when that moves. Raises UserError for others."""
    schedulers: Any = []
    if isinstance(found, Mapping):
        found, schedulers = found.get("optimizer"), found.get("lr_scheduler", [])
    elif isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        found, schedulers = found
    optimizers = list(found) if isinstance(found, list | tuple) else [found]
    schedulers = list(schedulers) if isinstance(schedulers, list | tuple) else [schedulers]
    if len(optimizers) != 1 or len(schedulers) > 1:
        _refuse(f"{len(optimizers)} optimizers and {len(schedulers)} LR schedulers", "a task has one of each at most")
    if isinstance(optimizers[0], Mapping):  # a list with one dictionary
        return _configured(optimizers[0])
    config = dict(schedulers[0]) if schedulers and isinstance(schedulers[0], Mapping) else {}
    scheduler = config.get("scheduler") if config else (schedulers or [None])[0]
    if not isinstance(optimizers[0], Optimizer):
        _refuse(f"configure_optimizers returning {optimizers[0]!r}", "return an optimizer")
    if isinstance(scheduler, ReduceLROnPlateau):
        _refuse("ReduceLROnPlateau", "return the optimizer alone, and give the trainer the callback PlateauLR")
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        _refuse(f"the LR scheduler {scheduler!r}", "return one of torch's, or a dictionary with it as 'scheduler'")
    if config.get("frequency", 1) != 1 or config.get("interval", "epoch") not in ("step", "epoch"):
        _refuse(f"an LR scheduler with {config}", "it moves once per update, or once per epoch")
    return optimizers[0], scheduler, config.get("interval", "epoch")


def _shuffles_or_reads(loader: Any) -> bool:
    """Whether `loader` is a DataLoader that only shuffles its dataset, or reads it in order."""
    if isinstance(loader, Mapping) or (
        isinstance(loader, list | tuple) and any(isinstance(x, DataLoader) for x in loader)
    ):
        _refuse("several DataLoaders", "give one")
    return (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        and not getattr(loader.sampler, "replacement", False)
        and getattr(loader.sampler, "num_samples", len(loader.dataset)) == len(loader.dataset)  # type: ignore[arg-type]
    )


def _refuse(what: str, instead: str) -> NoReturn:
    raise UserError(f"{what} cannot be carried over from Lightning: {instead}.")
