"""Modules written for Lightning as tasks; Lightning itself is not imported."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from engine.adapters.lightning_run import STEPS, TRANSFERS, WAYS_OUT, Hooks, View, defines, refuse
from engine.callbacks import Callback, EarlyStopping
from engine.errors import UserError
from engine.loss import Loss
from engine.task import Task

log = logging.getLogger("tally")


class Lightning(Hooks, Task):
    """Trains a module with Lightning's methods: `training_step`, `configure_optimizers`, and loaders or given data.

    `module` is a LightningModule, or any `nn.Module` with these methods; it is trained in place, from process 0's
    parameters. `train` and `validation` replace its own loaders, and are what `Task.train_data` may return; `train` may
    be a LightningDataModule. A DataLoader that only shuffles or reads in order gives its dataset, order and
    `collate_fn`; micro-batches and workers are the trainer's.

    `training_step` returns the mean over the micro-batch's samples, a dictionary with it as "loss", or a `Loss`. What
    it logs is recorded with each update, as a mean over the window. What `validation_step` logs, or else its loss, are
    the metrics. Hooks are called and LR schedulers moved where Lightning does it. `batch_idx` counts this process's
    micro-batches since the start of the epoch, or of a validation.

    Raises UserError that names all that cannot be carried over of the class, and later for what its methods return.
    """

    def __init__(self, module: nn.Module, train: Any = None, validation: Any = None) -> None:
        _check_module(module)
        super().__init__(module)
        self.datamodule = train if hasattr(train, "train_dataloader") else None
        self._given = None if self.datamodule is not None else train, validation
        self._sources: list[Any] = [module] if self.datamodule is None else [train, module]
        self._data: tuple[Any, Any] | None = None
        self._collate: Any = None
        self._in_order = 0
        self._takes = {step: _arguments(module, step) for step in STEPS if defines(module, step)}
        self._transfers = [hook for name in TRANSFERS if (hook := self._own(name)) is not None]
        self._now = ""
        self._means: dict[str, Loss | Tensor] = {}
        attributes: Any = module
        attributes.log, attributes.log_dict = self._log, self._log_dict
        self._show(View())

    def configure_callbacks(self, trainer: Any) -> list[Callback]:
        self._show(View(trainer))
        found = self.module.configure_callbacks() if defines(self.module, "configure_callbacks") else []
        return [self, *map(_translated, _listed(found))]

    def prepare_data(self) -> None:
        for source in self._sources:
            if defines(source, "prepare_data"):
                source.prepare_data()

    def configure_model(self) -> nn.Module:
        if defines(self.module, "configure_model"):
            self.module.configure_model()
        return Steps(self.module)

    def configure_optimizer(self, model: nn.Module) -> Optimizer | tuple[Optimizer, LRScheduler]:
        optimizer, self._schedulers = _configured(self.module.configure_optimizers())
        match self._schedulers:
            case [{"scheduler": LRScheduler() as only, "interval": "step", "frequency": 1}]:
                if not defines(self.module, "lr_scheduler_step"):
                    self._schedulers = []  # the engine moves it
                    return optimizer, only
        return optimizer

    def train_data(self) -> Dataset[Any] | Iterable[Any]:
        return self._loaded()[0]  # type: ignore[no-any-return]

    def validation_data(self) -> Dataset[Any] | Iterable[Any] | None:
        return self._loaded()[1] if defines(self.module, "validation_step") else None

    def collate(self, samples: list[Any]) -> Any:
        return self._collate(samples) if self._collate is not None else super().collate(samples)

    def order(self, epoch: int) -> Sequence[int] | None:
        return range(self._in_order) if self._in_order else None

    def loss(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        if self._ended is not None:
            self._call("on_after_backward")
            self._end_batch()
        found, batch, index = self._step(model, "training_step", "on_train_batch_start", batch)
        outputs = dict(found) if isinstance(found, Mapping) else {"loss": found}
        loss: Any = outputs["loss"]
        tensor = loss.sum if isinstance(loss, Loss) else loss
        self._call("on_before_backward", tensor)
        if {"on_after_backward", "on_train_batch_end"} & self._hooks.keys():
            self._ended = {**outputs, "loss": tensor.detach()}, batch, index
        return loss  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss | Tensor]:
        self._means = {}
        found, batch, index = self._step(model, "validation_step", "on_validation_batch_start", batch)
        self._call("on_validation_batch_end", found, batch, index)
        if self._means or found is None:
            return self._means
        return found if isinstance(found, Mapping) else {"loss": found}

    def _step(self, model: nn.Module, step: str, hook: str, batch: Any) -> tuple[Any, Any, int]:
        index = self._index[step]
        self._index[step] += 1
        for transfer in self._transfers:
            batch = transfer(batch, 0)
        self._call(hook, batch, index)
        self._now = step
        found = model(step, *(batch, index)[: self._takes[step]])
        self._now = ""
        return found, batch, index

    def _own(self, name: str) -> Any:
        """Return the datamodule's method of that name, else the module's, else None."""
        return next((getattr(source, name) for source in self._sources if defines(source, name)), None)

    def _show(self, view: View) -> None:
        for source in self._sources:
            source.trainer = view

    def _loaded(self) -> tuple[Any, Any]:
        """Return both kinds of data, and take loaders apart, once."""
        if self._data is None:
            for source in self._sources:
                if defines(source, "setup"):
                    source.setup("fit")
            makers = [self._own(name) for name in ("train_dataloader", "val_dataloader")]
            own: list[Any] = [_only(make()) if make is not None else None for make in makers]
            train, validation = (mine if given is None else given for given, mine in zip(self._given, own, strict=True))
            if train is None:
                refuse("a module without train_dataloader", "give the data: Lightning(module, train=dataset)")
            found = [(data, _shuffles_or_reads(data)) for data in (train, validation)]
            loaders = [data for data, is_plain in found if is_plain]
            if len({loader.collate_fn for loader in loaders}) > 1:
                refuse("two DataLoaders with different collate_fn", "use one for both")
            if loaders:
                self._collate = loaders[0].collate_fn
                log.info("DataLoader: the dataset is read; its batch_size and num_workers are the trainer's to say")
            if found[0][1] and isinstance(train.sampler, SequentialSampler):
                self._in_order = len(train.dataset)
            first, second = (data.dataset if is_plain else data for data, is_plain in found)
            self._data = first, second
        return self._data

    def _log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **options: Any) -> None:
        trains = self._now == "training_step"
        if hasattr(value, "compute") and hasattr(value, "reset"):
            step_value = getattr(value, "_forward_cache", None) if trains else None
            validates = self._now == "validation_step" or not (trains or self.module.training)
            (self._logged if validates else self._metrics)[name if step_value is None else f"{name}_epoch"] = value
            if step_value is None:
                return
            value = step_value
        if not isinstance(value, Tensor | Real) or (isinstance(value, Tensor) and value.numel() != 1):
            refuse(f"self.log({name!r}, a {type(value).__name__})", "log a number or a metric")
        if options.get("reduce_fx", "mean") not in ("mean", torch.mean):
            refuse(f"self.log({name!r}, reduce_fx={options['reduce_fx']!r})", "log a mean, or a metric object")
        mean = torch.as_tensor(value).detach().reshape(())
        if trains:
            self.log(name, mean, batch_size)
        elif self._now:
            self._means[name] = mean if batch_size is None else Loss(mean * batch_size, batch_size)
        else:
            self._logged[name] = mean

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
        return getattr(self.own, step)(*arguments)

    @property
    def training(self) -> bool:
        """The module's own mode."""
        return self.own.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.own.training = mode

    def train(self, mode: bool = True) -> Steps:
        self.own.train(mode)
        return self

    def to(self, *arguments: Any, **options: Any) -> Steps:
        self.own.to(*arguments, **options)
        return self


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module) or not defines(module, "training_step"):
        refuse(type(module).__name__, "give an nn.Module with training_step and configure_optimizers")
    problems = [f"the method {name}: {way_out}" for name, way_out in WAYS_OUT.items() if defines(module, name)]
    if not defines(module, "configure_optimizers"):
        problems.append("no configure_optimizers: return an optimizer from it")
    if not getattr(module, "automatic_optimization", True):
        problems.append("automatic_optimization=False: the engine makes the updates. Write the loop with Accumulator")
    for step in STEPS:
        if defines(module, step) and not 1 <= _arguments(module, step) <= 2:
            problems.append(f"{step} with other arguments than (batch, batch_idx): use one loader, and take a batch")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{type(module).__name__} cannot be carried over from Lightning as it is:\n  {listed}")


def _arguments(module: nn.Module, step: str) -> int:
    """Return the number of arguments that a step takes; 0 for an unsupported step."""
    parameters = inspect.signature(getattr(module, step)).parameters.values()
    if any(p.name == "dataloader_iter" for p in parameters):
        return 0
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return sum(p.default is p.empty or p.name == "batch_idx" for p in parameters)


def _translated(callback: Any) -> Any:
    """Return Lightning's EarlyStopping as the engine's, and what is the engine's. Raises UserError for others."""
    name = type(callback).__name__
    if name == "EarlyStopping" and not isinstance(callback, Callback):
        return EarlyStopping(callback.monitor, callback.patience, callback.mode, abs(callback.min_delta))
    if not isinstance(callback, Callback):
        refuse(f"the callback {name}", "use Trainer(keep_best='min:NAME') for ModelCheckpoint, or engine.Callback")
    return callback


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, list | tuple) else [found]


def _configured(found: Any) -> tuple[Optimizer, list[dict[str, Any]]]:
    """Return the one optimizer, and its schedulers with when each moves. Raises UserError for others."""
    optimizers = _listed(found)
    schedulers: list[Any] = []
    match optimizers:
        case [{**options}]:
            optimizers, schedulers = _listed(options.get("optimizer")), _listed(options.get("lr_scheduler", []))
        case [list() | tuple() as several, given] if isinstance(found, tuple):
            optimizers, schedulers = list(several), _listed(given)
    if len(optimizers) != 1:
        way_out = "automatic optimization has one, in Lightning too. A Task may return several that step together"
        refuse(f"{len(optimizers)} optimizers", way_out)
    if not isinstance(optimizers[0], Optimizer):
        refuse(f"configure_optimizers returning {optimizers[0]!r}", "return an optimizer")
    configs = []
    for given in schedulers:
        config = {"interval": "epoch", "frequency": 1, "monitor": None}
        config |= given if isinstance(given, Mapping) else {"scheduler": given}
        if not hasattr(config.get("scheduler"), "step") or config["interval"] not in ("step", "epoch"):
            refuse(f"the LR scheduler {given!r}", "return one of torch's, or a dictionary with it as 'scheduler'")
        configs.append(config)
    return optimizers[0], configs


def _only(loader: Any) -> Any:
    """Return the one loader. Raises UserError for several."""
    loaders = _listed(loader)
    if isinstance(loader, Mapping) or (len(loaders) > 1 and any(isinstance(one, DataLoader) for one in loaders)):
        refuse("several DataLoaders", "give one, as of torch.utils.data.ConcatDataset")
    return loaders[0] if len(loaders) == 1 else loader


def _shuffles_or_reads(loader: Any) -> bool:
    """Whether `loader` is a DataLoader that only shuffles its dataset, or reads it in order."""
    return (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        and not getattr(loader.sampler, "replacement", False)
        and getattr(loader.sampler, "num_samples", len(loader.dataset)) == len(loader.dataset)  # type: ignore[arg-type]
    )
