"""Strategies: devices, processes and collectives. They know nothing of epochs, data or files."""

from strategies.base import MicroBatch, PendingRows, Strategy
from strategies.buffers import Buffers
from strategies.ddp import DDPStrategy
from strategies.dp import DPStrategy
from strategies.errors import UserError, check_count
from strategies.fsdp import FSDPStrategy
from strategies.optimizer_state import user_name
from strategies.pipeline import PipelineStrategy
from strategies.registry import find, resolve
from strategies.single import SingleDeviceStrategy

__all__ = [
    "Buffers",
    "DDPStrategy",
    "DPStrategy",
    "FSDPStrategy",
    "MicroBatch",
    "PendingRows",
    "PipelineStrategy",
    "SingleDeviceStrategy",
    "Strategy",
    "UserError",
    "check_count",
    "find",
    "resolve",
    "user_name",
]
