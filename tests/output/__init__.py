"""What a run tells is what it did: progress, loggers, callbacks, figures and the report."""
