"""The layout does not matter: P x K in {1x4, 2x2, 4x1} see the same samples and end alike."""
