"""Schedules of K, drawn."""

from __future__ import annotations

from hypothesis import strategies as st

from engine.plan.schedule import Schedule, Stage, check_scheduling

UNITS = ["epoch", "update", "sample"]


schedules = st.dictionaries(st.integers(0, 40), st.integers(1, 9), min_size=1, max_size=5).map(check_scheduling)


def schedule_of(scheduling: dict[int, int], unit: str, P: int = 1, N: int = 1) -> Schedule:
    return Schedule(tuple(Stage(first, K, P * N * K) for first, K in scheduling.items()), unit)  # type: ignore[arg-type]
