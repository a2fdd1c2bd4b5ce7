"""Time: epochs, windows, updates; data order; loss weights; callbacks."""

from engine.accumulator import Accumulator as Accumulator
from engine.callbacks import Callback as Callback
from engine.callbacks import GradientAccumulationScheduler as GradientAccumulationScheduler
from engine.loss import Loss as Loss
from engine.optimizers import parameter_groups as parameter_groups
from engine.task import Batching as Batching
from engine.task import Task as Task
from engine.trainer import Trainer as Trainer
from engine.version import __version__ as __version__
from engine.window_task import Added as Added
from engine.window_task import Rows as Rows
from engine.window_task import Shared as Shared
from engine.window_task import TermTask as TermTask
from engine.window_task import WindowTask as WindowTask
from strategies import Optimizers as Optimizers
