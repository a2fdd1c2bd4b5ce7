"""The task: the class that a user writes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from engine.collate import collated
from engine.errors import UserError
from engine.loss import Loss, Terms

Configured = Optimizer | tuple[Optimizer, LRScheduler]  # the scheduler moves once per update


class Batching:
    """Makes micro-batches of samples; every method has a default."""

    def collate(self, samples: list[Any]) -> Any:
        """Make one micro-batch of a list of samples: here torch's `default_collate`."""
        return collated(samples)

    def collate_validation(self, samples: list[Any]) -> Any:
        """Make one micro-batch to validate, test or predict on: here as `collate` does."""
        return self.collate(samples)

    def order(self, epoch: int) -> Sequence[int] | None:
        """Return the order of a training epoch as indices into the dataset, or None for the trainer's.

        It must depend on `epoch` alone, be the same on all processes, and of one length in all epochs. Indices may
        repeat or be missing (weighted sampling, buckets of similar length).
        """
        return None

    def batch_size(self, batch: Any) -> int:
        """Return the number of samples in a micro-batch: here dim 0 of the first tensor in it.

        Raises UserError if there is no tensor. A loss that is a mean over the micro-batch's samples is weighted by it.
        """
        first = batch[0] if type(batch) in (list, tuple) and batch else batch
        if type(first) is Tensor and not first.is_nested and (shape := first.shape):
            return shape[0]
        for size, _ in tensors(batch):
            return size
        raise UserError(
            f"cannot tell how many samples are in a micro-batch of type {type(batch).__name__}: "
            f"give {type(self).__name__} a method batch_size(self, batch) -> int that returns it."
        )

    def split(self, batch: Any, size: int) -> Sequence[Any]:
        """Return a ready micro-batch of a stream in pieces of at most `size` samples: memory ran out on the whole.

        Here tensors, and lists without tensors, of as many rows as samples are cut, in lists, tuples and dictionaries
        too. Raises UserError for anything else.
        """
        rows = self.batch_size(batch)
        try:
            return [_cut(batch, rows, slice(start, start + size)) for start in range(0, rows, size)]
        except TypeError as error:
            raise UserError(
                f"memory ran out, and a micro-batch of {rows} samples cannot be cut: it holds {error}. Give "
                f"{type(self).__name__} a method split(self, batch, size) that returns its pieces."
            ) from None


def _cut(item: Any, rows: int, part: slice) -> Any:
    """Cut all that has `rows` rows in a micro-batch. Raises TypeError, which names what has not."""
    if isinstance(item, Tensor) and item.ndim and len(item) == rows:
        return item[part]
    if type(item) is list and len(item) == rows and not [*tensors(item)]:
        return item[part]
    if type(item) is dict:
        return {name: _cut(value, rows, part) for name, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(_cut(value, rows, part) for value in item)
    of = f" of shape {tuple(item.shape)}" if isinstance(item, Tensor) else ""
    raise TypeError(f"a {type(item).__name__}{of}")


Logged = tuple[str, float | Tensor, float | Tensor | None]  # name, value and weight of one call of `Task.log`


class Task(Batching, ABC):
    """One model, its optimizers, one source of data, one loss. Models that learn in turn need a loop of your own."""

    total_updates: int | None = None
    """The exact number of updates to come, set before `configure_optimizer` (for warm-up); None if it is unknown."""

    validation_metrics: Mapping[str, Any] = MappingProxyType({})
    """Validation metrics that are not means, by name: objects of `torchmetrics`, or with the methods named here.

    Set it in `__init__`, and let `evaluate` call their `update`. The engine calls `reset()` before each validation and
    `compute()` after it, on process 0, where `merge_state(other)` has added the samples of the other processes. They
    are pickled for that. `compute()` returns a number, or numbers in a tensor, list or dictionary.
    """

    _log_entries: list[Logged] | None = None  # calls of `log` that are not added up yet; None outside of a run

    def prepare_data(self) -> None:
        """Download or unpack, once per host, before anything else is asked; keep nothing on `self`."""

    def configure_callbacks(self, trainer: Any) -> Sequence[Any]:
        """Return callbacks that the task brings, called before those of `trainer`, which is about to run it."""
        return ()

    @abstractmethod
    def configure_model(self) -> nn.Module:
        """Return the model, on the CPU, in the mode that it trains in, drawn from the seed on all processes alike."""

    @abstractmethod
    def configure_optimizer(self, model: nn.Module) -> Configured | Sequence[Configured]:
        """Return an optimizer for `model`, now on its device, or it and an LR scheduler that moves once per update.

        A list of these makes several that step together: one clip and one skip for all. Each trainable parameter must
        then be in exactly one of them; `engine.parameter_groups` shares them out.
        """

    @abstractmethod
    def train_data(self) -> Dataset[Any] | Iterable[Any]:
        """Return a map-style dataset, or an iterable of ready micro-batches (a `DataLoader`, a stream).

        Anything with `__getitem__` and `__len__` is a dataset of samples, the same on all processes: the engine makes
        micro-batches of it. Any other iterable gives those of this process, once per epoch, and may be longer on some.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Loss | Tensor | Terms:
        """Return the loss of one micro-batch; `model` is the prepared module: call it.

        A 0-dim tensor means the mean over the micro-batch's samples. Anything weighted otherwise is a `Loss`, as
        `engine.losses` return it. A dict of several `Loss` by name needs `weights` too, or a `TermTask`.
        """

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Return the weight of each term that `loss` returns for a micro-batch, which is still on the host.

        Override it only for several terms: an update's gradient is the sum of d(sums of a term) / (weights of a term),
        over all processes, without terms of weight 0. The window's micro-batches wait on the host for that. All raise
        UserError for names that differ, an invalid weight, or other weights from `loss`.
        """
        return {}

    def validation_data(self) -> Dataset[Any] | Iterable[Any] | None:
        """Return data of the same kinds to evaluate on, or None."""
        return None

    def test_data(self) -> Dataset[Any] | Iterable[Any] | None:
        """Return data of the same kinds for `Trainer.test`, or None."""
        return None

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss | Tensor] | None:
        """Return the metrics of one micro-batch, averaged by weight over all data and processes, as is what it logs."""
        loss = self.loss(model, batch)
        return loss if isinstance(loss, Mapping) else {"loss": loss}

    def log(self, name: str, value: float | Tensor, weight: float | Tensor | None = None) -> None:
        """Record the mean of `value`, weighted by `weight`, over an update's window (or a validation) and processes.

        Call it in `loss` or `evaluate`. `value` is a number or a 0-dim tensor, and stays on its device: the mean over
        `weight` items of this micro-batch, by default its samples. All processes with a micro-batch in the first window
        raise UserError unless they log the same names, if need be with weight 0. Outside of a run it does nothing.
        """
        if self._log_entries is not None:
            self._log_entries.append((name, value, weight))

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """Return one row for each sample of a micro-batch: a tensor, a list, or a dictionary of them.

        By default the model's output for the batch, or for the first part of one that is a list or tuple.
        """
        return model(batch[0] if isinstance(batch, list | tuple) else batch)


def tensors(item: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield each tensor in a micro-batch, with the samples that it seems to hold: dim 0, or the packed sequences."""
    if isinstance(item, PackedSequence):
        yield int(item.batch_sizes[0]), item.data
    elif isinstance(item, Tensor):
        if item.ndim:
            yield item.size(0), item
    elif isinstance(item, (list, tuple, Mapping)):
        for part in item.values() if isinstance(item, Mapping) else item:
            yield from tensors(part)
