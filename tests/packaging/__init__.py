"""What is shipped is enough: the wheel, the recipes and the templates; its parts import one another one way."""
