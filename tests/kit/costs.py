"""What tests cost: seconds of the processor and processes started, by the kernel's clocks; `launch/test.sh --costs`.

A busy machine makes tests slower, and these numbers hardly larger.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

SHOWN = 50
_started = 0
_before = (0.0, 0.0, 0)


def _count() -> None:
    global _started
    _started += 1


class _Popen(subprocess.Popen[Any]):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        _count()
        super().__init__(*arguments, **options)


def _spent() -> tuple[float, float, int]:
    """Return the user seconds, system seconds and processes of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.children_user, times.system + times.children_system, _started


def pytest_configure(config: pytest.Config) -> None:
    os.register_at_fork(before=_count)
    subprocess.Popen = _Popen  # type: ignore[misc]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _before
    _before = _spent()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.when == "teardown":
        item.user_properties.append(("cost", [now - then for now, then in zip(_spent(), _before, strict=True)]))
    return (yield)  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the sums, by folder and altogether, and the dearest tests."""
    costs: dict[str, list[float]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "teardown":
            costs[report.nodeid] = dict(report.user_properties)["cost"]
    groups: dict[str, list[float]] = {}
    for name, cost in costs.items():
        for group in ("all", "/".join(name.split("/")[:2])):
            groups[group] = [a + b for a, b in zip(groups.get(group, [0, 0, 0]), cost, strict=True)]
    dearest = sorted(costs.items(), key=lambda item: -sum(item[1][:2]))[:SHOWN]
    terminalreporter.write_line(f"{'user':>7} {'system':>7} {'processes':>9}")
    for name, (user, system, processes) in [*groups.items(), *dearest]:
        terminalreporter.write_line(f"{user:7.2f} {system:7.2f} {processes:9.0f} {name}")
