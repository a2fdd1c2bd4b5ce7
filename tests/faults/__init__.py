"""A test can fail: each promise is broken on purpose, and its tests see it; a file for each room of the code."""
