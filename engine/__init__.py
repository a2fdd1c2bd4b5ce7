"""Time: epochs, windows, updates; data order; loss weights; callbacks."""

from engine.accumulator import Accumulator
from engine.callbacks import Callback, GradientAccumulationScheduler
from engine.loss import Loss
from engine.optimizers import parameter_groups
from engine.task import Batching, Task
from engine.trainer import Trainer
from engine.version import __version__ as __version__
from engine.window_task import Added, Rows, Shared, TermTask, WindowTask
from strategies import Optimizers

__all__ = [
    "Accumulator",
    "Added",
    "Batching",
    "Callback",
    "GradientAccumulationScheduler",
    "Loss",
    "Optimizers",
    "Rows",
    "Shared",
    "Task",
    "TermTask",
    "Trainer",
    "WindowTask",
    "parameter_groups",
]
