"""Strategies: devices, processes and collectives. They know nothing of epochs, data or files."""

from strategies.base import MicroBatch as MicroBatch
from strategies.base import PendingRows as PendingRows
from strategies.base import Strategy as Strategy
from strategies.buffers import Buffers as Buffers
from strategies.ddp import DDPStrategy as DDPStrategy
from strategies.dp import DPStrategy as DPStrategy
from strategies.errors import UserError as UserError
from strategies.errors import check_count as check_count
from strategies.fsdp import FSDPStrategy as FSDPStrategy
from strategies.optimizer_state import user_name as user_name
from strategies.optimizers import Optimizers as Optimizers
from strategies.optimizers import parts_of as parts_of
from strategies.optimizers import with_modes as with_modes
from strategies.pipeline import PipelineStrategy as PipelineStrategy
from strategies.registry import find as find
from strategies.registry import resolve as resolve
from strategies.single import SingleDeviceStrategy as SingleDeviceStrategy
