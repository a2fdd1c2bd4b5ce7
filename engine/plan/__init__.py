"""The plan of a run: schedules and windows, as arithmetic without torch."""
