"""Starters: the README's two commands, and recipes."""
