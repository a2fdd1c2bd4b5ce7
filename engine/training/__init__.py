"""One run: build, epochs, validation, heartbeat."""
