"""One window is one big batch: its update is that of plain torch on all of its samples, to 1e-12."""
