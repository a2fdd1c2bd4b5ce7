"""Records, run folder and summary of a run."""
