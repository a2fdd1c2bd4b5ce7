"""The package is enough: wheel, recipes and templates work alone, and imports go one way."""
