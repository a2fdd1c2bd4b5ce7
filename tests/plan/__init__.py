"""A plan says beforehand what a run does: which samples each update sees, in which order, and at what cost."""
