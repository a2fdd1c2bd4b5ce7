"""Programs, commands and figures in the docs are run and compared."""
