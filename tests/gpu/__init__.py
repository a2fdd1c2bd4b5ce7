"""One command checks and measures a GPU, and writes down what it has seen, also if a part fails."""
