"""The TensorBoard logger: `tensorboard --logdir runs` compares all runs."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from engine.errors import UserError
from engine.loggers.base import Start
from engine.loggers.grouped import GroupedLogger


class TensorBoardLogger(GroupedLogger):
    """Writes scalars by update into `tensorboard/` in the run_dir. Raises UserError if TensorBoard is missing.

    `writer` is torch's SummaryWriter on process 0 while a run lasts, for images and histograms. Elsewhere it is None.
    """

    needs_run_dir = True
    writer: Any = None

    def __init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("the tensorboard logger needs TensorBoard: pip install 'tally-engine[tensorboard]'.")

    def open(self, start: Start) -> None:
        """Open the events file, and let TensorBoard drop the records that come again."""
        from torch.utils.tensorboard import SummaryWriter

        super().open(start)
        is_whole = start.validated_update == start.update  # or its validation may be there and come again
        first = start.update + 1 if is_whole else start.update
        self.writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first, flush_secs=1)
        if not is_whole:
            self._weight -= start.record["weight"]
            self.log(start.record)

    def write(self, update: int, values: Mapping[str, float], is_update: bool) -> None:
        """Write scalars; a validation's samples and weight are those of its update, which are written already."""
        for name, value in values.items():
            if is_update or not name.startswith("data/"):
                self.writer.add_scalar(name, value, update)

    def close(self) -> None:
        self.writer.close()
