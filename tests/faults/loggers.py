"""Faults of engine/loggers."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "begin another run of wandb at a resume",
        "TrackerLogger.open",
        "if resumes else {}",
        "if False else {}",
        "tests/output/test_loggers.py -k wandb -m slow",
    ),
    Fault(
        "let a logger end the run",
        "_Guarded._try",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        "tests/output/test_loggers.py -k away",
    ),
    Fault(
        "keep rows that come again",
        "engine.loggers.csv_tables:_is_before",
        " and int(number) <= update",
        "",
        "tests/output/test_loggers.py -k history",
    ),
    Fault(
        "tell TensorBoard nothing of a resume",
        "TensorBoardLogger.open",
        "purge_step=first",
        "purge_step=None",
        "tests/output/test_loggers.py -k history",
    ),
]
