"""The audit: does a trainer's accumulated gradient equal that of one big batch? `python -m engine.audit --help`.

An adapter is a function `train(job)` that trains `job.model` with the trainer under audit, on each process.
"""

from engine.audit.cases import CASES, Adapter, Job
from engine.audit.report import Report, audit

__all__ = ["CASES", "Adapter", "Job", "Report", "audit"]
