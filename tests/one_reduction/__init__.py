"""One window, one reduction: nothing is communicated per micro-batch, and little is called."""
