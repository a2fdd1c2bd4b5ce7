"""Fully sharded data parallelism."""

from strategies.fsdp.strategy import FSDPStrategy as FSDPStrategy
