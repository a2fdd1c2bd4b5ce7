"""Output is true: progress, loggers, callbacks, figures and the report say what the run did."""
