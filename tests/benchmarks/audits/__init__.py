"""Engines under audit, each in a file as its own guide writes it: functions `train(job)`."""
