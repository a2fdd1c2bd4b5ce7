"""Distributed data parallelism."""

from strategies.ddp.strategy import DDPStrategy as DDPStrategy
