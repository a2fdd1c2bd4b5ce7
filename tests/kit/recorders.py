"""What is counted and kept while a run trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit.reference import Watch

LOOK = "_local_scalar_dense"


class Collectives(TorchDispatchMode):
    """Counts what is given to a process group, and reads of a number from the device (`.item()`), by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" or name == LOOK:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Count(Watch):
    """Counts the collectives, and apart from them the looks, of each update, its boundary included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[dict[str, int]] = []
        self.looks: list[int] = []

    def on_fit_start(self, trainer: Any) -> None:
        self.mode = Collectives()
        self.mode.__enter__()

    def on_epoch_start(self, trainer: Any) -> None:
        self.mode.counts.clear()  # the end of an epoch compares replicas
        self.reductions = trainer.strategy.reductions()

    def on_update_end(self, trainer: Any) -> None:
        super().on_update_end(trainer)
        self.looks.append(self.mode.counts.pop(LOOK, 0))
        self.counts.append(dict(self.mode.counts))
        self.mode.counts.clear()

    def on_fit_end(self, trainer: Any) -> None:
        self.mode.__exit__(None, None, None)
