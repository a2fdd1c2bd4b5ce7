"""Every setting of Python works on the command line, and can be tried before it trains."""
