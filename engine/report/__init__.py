"""A run on one page: `python -m engine.report RUN [RUN ...]`."""

from engine.report.page import page
from engine.report.reading import NotARunError, Run, read

__all__ = ["NotARunError", "Run", "page", "read"]
