"""An audit of anyone's trainer says whether it is exact, names one fault rightly, and names nothing else."""
