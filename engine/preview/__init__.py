"""Previews of a run before it starts."""
