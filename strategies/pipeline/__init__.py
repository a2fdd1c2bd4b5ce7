"""Pipeline parallelism."""

from strategies.pipeline.strategy import PipelineStrategy as PipelineStrategy
