"""Loggers: where else records go."""

from engine.loggers.base import Logger, Start, opened
from engine.loggers.csv_tables import CSVLogger
from engine.loggers.grouped import GroupedLogger
from engine.loggers.names import make_loggers
from engine.loggers.tensorboard_events import TensorBoardLogger
from engine.loggers.tracker import TrackerLogger

__all__ = [
    "CSVLogger",
    "GroupedLogger",
    "Logger",
    "Start",
    "TensorBoardLogger",
    "TrackerLogger",
    "make_loggers",
    "opened",
]
