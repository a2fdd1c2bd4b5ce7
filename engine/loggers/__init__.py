"""Loggers: where else records go."""

from engine.loggers.base import Logger as Logger
from engine.loggers.base import Start as Start
from engine.loggers.csv_tables import CSVLogger as CSVLogger
from engine.loggers.grouped import GroupedLogger as GroupedLogger
from engine.loggers.tensorboard_events import TensorBoardLogger as TensorBoardLogger
from engine.loggers.tracker import TrackerLogger as TrackerLogger
