"""The same job in Tally and in another engine, each a program: `lines.py` counts their logical lines."""
