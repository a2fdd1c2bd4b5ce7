"""A strategy keeps what it declares, whatever it shares out; the engine asks none what class it has."""
