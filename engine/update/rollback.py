"""Rollback: the state that forward changes before an update, so that a window without an update leaves no trace."""

from engine.update.host_rng import HostRng
from strategies import Buffers


class Rollback:
    """Keeps the buffers of the boundary before a window, and the host's generators in a run that can be interrupted.

    A dropped window is run again with the same draws; a skipped one has used them.
    """

    def __init__(self, buffers: Buffers, host_rng: HostRng | None) -> None:
        self._buffers, self._host_rng = buffers, host_rng

    def begin(self, update: int) -> None:
        """Keep the state before the window of `update`."""
        if self._buffers.exist:
            self._buffers.keep()
        if self._host_rng is not None:
            self._host_rng.start_window(update)

    def skip(self) -> None:
        """Restore the buffers: the update was skipped."""
        self._buffers.restore()

    def undo(self) -> None:
        """Restore everything: the window was dropped."""
        self._buffers.restore()
        if self._host_rng is not None:
            self._host_rng.drop()
