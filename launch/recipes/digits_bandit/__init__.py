"""A bandit on handwritten digits: policy gradients in a loop of your own, with windows driven by calls."""
