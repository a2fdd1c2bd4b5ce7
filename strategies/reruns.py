"""The strategy's part in windows that run again: for a loss over all outputs, or because memory ran out."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class Reruns:
    """The part of a strategy for windows that run again. Every method has a default for one process."""

    supports_window_losses = True
    """Whether it can run a window twice, for a loss over all outputs of the window."""

    supports_open_windows = True
    """Whether processes can call forward and backward differently often, before a pass without data reduces."""

    runs_twice = False
    """Whether each window runs twice; the engine sets it before `prepare`."""

    supports_redo: bool = False
    """Whether a window that ran out of memory on a process can run again, on all, in smaller micro-batches."""

    accumulation_context: Callable[[bool], AbstractContextManager[Any]]

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The context of a forward that keeps no graph, because its micro-batch runs again."""
        with self.accumulation_context(False), torch.no_grad():
            yield

    def end_first_pass(self, has_output: bool) -> None:
        """Called on all processes after the forwards of the first pass; then they exchange their outputs.

        The last forward keeps its graph. `has_output` is False on a process without data, or whose first pass failed.
        """

    def finish_reduction(self) -> bool:
        """Let the others finish a window whose last backward failed here, with a gradient norm that is not finite.

        Return False if that cannot be done: they then wait in vain. Needed by several processes with `supports_redo`.
        """
        return False

    def restart_reduction(self) -> None:
        """Called on all processes after a window that ran out of memory: it may have left a reduction unfinished."""
