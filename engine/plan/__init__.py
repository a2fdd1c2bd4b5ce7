"""Which samples each update sees: schedules and windows, as arithmetic without torch."""
