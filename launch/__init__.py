"""How to start: the README's two commands, and recipes."""
