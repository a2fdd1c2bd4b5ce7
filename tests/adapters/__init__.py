"""Classes that were written for other libraries train as they are."""
