"""What can be said in Python can be said on the command line, and tried before it trains."""
