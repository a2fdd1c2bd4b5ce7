"""The passes of a window under FSDP: equally many on all processes, with or without data."""

from collections.abc import Callable
from typing import Any

from strategies.fsdp.collective_order import BACKWARD, BOTH, FORWARD, CollectiveOrder
from strategies.torch_internals import reset_fsdp


class Passes:
    """Makes the passes of each window, so that a process with fewer micro-batches takes part without data.

    A window of at most K micro-batches is K passes of forward and backward. If it runs twice, it is K forwards, the
    last with a graph, the backward of that, and K - 1 passes of both. `on_window` is called before the first pass.
    `reduces_each` and `reshard_after_forward` are options of the strategy.
    """

    def __init__(
        self,
        root: Any,
        order: CollectiveOrder,
        reduces_each: bool,
        reshard_after_forward: bool | None,
        on_window: Callable[[], None],
    ) -> None:
        self._root, self._order, self._on_window = root, order, on_window
        self._reduces_each, self._reshards = reduces_each, reshard_after_forward is not False
        self.is_last = False  # whether this process's last micro-batch of the window runs
        self._is_closing: bool | None = None
        self._made, self._most, self._forwards = 0, 0, 0

    def start_window(self, most: int, runs_twice: bool) -> None:
        """Note the largest number of micro-batches that any process has in the next window."""
        self._most, self._forwards = (2 * most, most) if runs_twice else (most, 0)

    def start(self, is_last: bool) -> None:
        """Start a pass, and set what FSDP does in its backward."""
        self.is_last = is_last
        if not self._made:
            self._order.used.clear()
            self._on_window()
        is_closing = self._made + 1 == self._most if self._most else is_last
        if is_closing != self._is_closing:
            self._is_closing = is_closing
            self._root.set_requires_gradient_sync(is_closing or self._reduces_each)
            self._root.set_requires_all_reduce(is_closing)
            self._root.set_reshard_after_backward(is_closing or self._reshards)
        kind = BOTH if self._made > self._forwards or not self._forwards else BACKWARD
        is_forward = self._made < self._forwards
        self._order.start(FORWARD if is_forward else kind, gathers=is_forward or not self._made)

    def end(self) -> None:
        """End a pass with data."""
        self._order.end()
        self._made += 1

    def end_forward(self) -> None:
        """Free what a forward whose graph is not kept has gathered."""
        self._made += 1
        reset_fsdp(self._root)

    def finish_forwards(self, but: int = 0) -> None:
        """Make the rest of the forwards of a window that runs twice, `but` for the last, without data."""
        while self._made < self._forwards - but:
            if not self._order.is_open:
                self.start(False)
            self._order.finish()
            self.end_forward()

    def finish(self) -> None:
        """Make the rest of the window's passes, without data."""
        while self._order.is_open or self._made < self._most:
            if not self._order.is_open:
                self.start(True)
            if not self._order.finish():
                break
            self._made += 1
        self._made = self._most = self._forwards = 0
