"""A device, a precision, a compiled model or a fused step changes the speed of a run, and nothing else."""
