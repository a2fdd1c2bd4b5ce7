"""A GAN on handwritten digits: two models that learn in turn, in a loop of your own."""
