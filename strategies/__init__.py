"""Strategies: devices, processes and collectives. They know nothing of epochs, data or files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from strategies.base import MicroBatch as MicroBatch
from strategies.base import Strategy as Strategy
from strategies.bits import sum_of_bits as sum_of_bits
from strategies.buffers import Buffers as Buffers
from strategies.ddp import DDPStrategy as DDPStrategy
from strategies.dp import DPStrategy as DPStrategy
from strategies.errors import UserError as UserError
from strategies.errors import check_count as check_count
from strategies.host_messages import PendingRows as PendingRows
from strategies.optimizer_state import user_name as user_name
from strategies.optimizers import Optimizers as Optimizers
from strategies.optimizers import parts_of as parts_of
from strategies.optimizers import with_modes as with_modes
from strategies.registry import find as find
from strategies.registry import resolve as resolve
from strategies.single import SingleDeviceStrategy as SingleDeviceStrategy
from strategies.summed_message import MESSAGE_MAXIMA as MESSAGE_MAXIMA

if TYPE_CHECKING:
    from strategies.fsdp import FSDPStrategy as FSDPStrategy
    from strategies.pipeline import PipelineStrategy as PipelineStrategy

SLOW_TO_IMPORT = {"FSDPStrategy": "strategies.fsdp", "PipelineStrategy": "strategies.pipeline"}
"""Classes imported at their first use: torch's parts of them take longer than all else, torch included."""


def __getattr__(name: str) -> Any:
    if name in SLOW_TO_IMPORT:
        return getattr(import_module(SLOW_TO_IMPORT[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
