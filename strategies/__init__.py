"""Place: devices, processes, collectives. Knows nothing of epochs, data or files."""

from strategies.base import MicroBatch, Rows, Strategy
from strategies.ddp import DDPStrategy
from strategies.dp import DPStrategy
from strategies.fsdp import FSDPStrategy
from strategies.names import find, resolve
from strategies.pipeline import PipelineStrategy
from strategies.single import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DPStrategy",
    "FSDPStrategy",
    "MicroBatch",
    "PipelineStrategy",
    "Rows",
    "SingleDeviceStrategy",
    "Strategy",
    "find",
    "resolve",
]
