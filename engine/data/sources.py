"""From what `train_data()` returns to a source of windows."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from engine.data.checks import check_dataset, check_order, check_stream
from engine.data.map_style import MapSource
from engine.data.stream import StreamSource
from engine.data.window import Loading, Source
from engine.errors import UserError
from engine.order import Order, sequential, shuffled
from engine.plan.schedule import Schedule
from engine.plan.windows import Plan
from engine.task import Batching


def is_map_style(data: object) -> bool:
    """Whether the engine makes the micro-batches of `data`. Raises UserError for what cannot be trained on."""
    if isinstance(data, IterableDataset):
        raise UserError(
            f"{type(data).__name__} is an IterableDataset of samples: return DataLoader(it, batch_size=N), or, "
            "if it yields ready micro-batches, DataLoader(it, batch_size=None)."
        )
    if isinstance(data, Mapping):
        keys = ", ".join(map(repr, [*data][:3]))
        raise UserError(
            f"train_data() or validation_data() returned a {type(data).__name__} with {keys}: expected a dataset of "
            "samples. Return one of its datasets, or TensorDataset(*columns)."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return True
    if hasattr(data, "__iter__"):
        return False
    raise UserError(
        f"train_data() or validation_data() returned {type(data).__name__}: return a map-style dataset, which has "
        "__getitem__ and __len__, or an iterable of micro-batches."
    )


def make_plan(
    data: Any,
    batching: Batching,
    schedule: Schedule,
    N: int,
    max_epochs: int | None,
    max_updates: int | None,
    effective_batch_size: int | None = None,
) -> Plan | None:
    """Return the plan of every window for map-style data, None for a stream. Raises UserError for too little data."""
    if not is_map_style(data):
        if effective_batch_size is not None:
            raise UserError(
                f"effective_batch_size={effective_batch_size} needs map-style data: the micro-batches of a stream come "
                "in sizes of their own. Use accumulate_grad_batches."
            )
        return None
    own = check_order(batching.order(0))
    samples = len(data) if own is None else len(own)
    check_dataset(len(data), N, samples)
    return Plan(samples, schedule, max_epochs, max_updates)


def make_source(data: Any, schedule: Schedule, plan: Plan | None, N: int, loading: Loading) -> Source:
    """Return the source of `data`'s windows: in the task's own order, else shuffled, else as it is."""
    if plan is None:
        check_stream(data, loading.strategy)
        return StreamSource(data, schedule, loading)
    order: Order = shuffled(plan.samples, loading.seed) if loading.shuffle else sequential(plan.samples)
    if loading.batching.order(0) is not None:
        order = loading.batching.order  # type: ignore[assignment]
    return MapSource(data, order, plan, N, loading)
