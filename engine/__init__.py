"""Time: epochs, windows, updates; data order; loss weights; callbacks."""

from engine.callbacks import Callback, GradientAccumulationScheduler
from engine.loss import Loss
from engine.task import Task
from engine.trainer import Trainer

__all__ = ["Callback", "GradientAccumulationScheduler", "Loss", "Task", "Trainer"]
