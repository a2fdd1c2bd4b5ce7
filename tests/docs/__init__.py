"""What the docs show works as it stands, and the figures that they name are those of their commands."""
