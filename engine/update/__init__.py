"""One window becomes one update."""
