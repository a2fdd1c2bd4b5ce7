"""Place: devices, processes, collectives. Knows nothing of epochs, data or files."""

from strategies.base import MicroBatch, PendingRows, Strategy
from strategies.ddp.strategy import DDPStrategy
from strategies.dp import DPStrategy
from strategies.fsdp.strategy import FSDPStrategy
from strategies.pipeline.strategy import PipelineStrategy
from strategies.registry import find, resolve
from strategies.single import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DPStrategy",
    "FSDPStrategy",
    "MicroBatch",
    "PendingRows",
    "PipelineStrategy",
    "SingleDeviceStrategy",
    "Strategy",
    "find",
    "resolve",
]
