"""Where the suite's time goes: CPU seconds of every test with its fixtures, and of its child processes.

CPU time and not the clock's, so that the numbers mean the same on a busy machine. Every run names the dearest
of the tests over the budget; `--rooms` adds a table by directory.
"""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterable

import pytest

BUDGET = 2.0
"""CPU seconds that one quick test may take, with the fixtures that it is the first to ask for."""
NAMED = 15
"""How many of the tests over the budget are named."""


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def crowding() -> float:
    """How many programs share each core: a limit in seconds holds on a machine of one's own, times this."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def room(node_id: str) -> str:
    """The directory of a test: tests/losses/test_pairs.py::test_x → losses."""
    path = node_id.split("::")[0].split("/")
    return path[1] if len(path) > 2 else "(top)"


def rooms_table(seconds: dict[str, float]) -> list[str]:
    """Tests and CPU seconds by directory, the dearest first."""
    tests, totals = defaultdict(int), defaultdict(float)
    for node_id, spent in seconds.items():
        tests[room(node_id)] += 1
        totals[room(node_id)] += spent
    rows = [f"{'room':<14}{'tests':>7}{'CPU s':>9}"]
    rows += [
        f"{name:<14}{tests[name]:>7}{totals[name]:>9.1f}"
        for name in sorted(totals, key=totals.__getitem__)[::-1]
    ]
    return [*rows, f"{'all':<14}{len(seconds):>7}{sum(totals.values()):>9.1f}"]


class CpuTimes:
    """Marks every phase's report with its CPU seconds, and sums them up at the end."""

    def __init__(self, by_room: bool) -> None:
        self.by_room = by_room
        self.since = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.since = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.since = now - self.since, now
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        seconds = sum_phases(report for reports in terminalreporter.stats.values() for report in reports)
        over = sorted(
            (test for test in seconds if seconds[test] > BUDGET), key=seconds.__getitem__, reverse=True
        )
        if over:
            total = sum(seconds[test] for test in over)
            terminalreporter.section(f"{len(over)} tests over {BUDGET:g} CPU seconds, {total:.0f} s together")
        for test in over[:NAMED]:
            terminalreporter.line(f"{seconds[test]:7.1f} s  {test}")
        if self.by_room:
            terminalreporter.section("CPU seconds by room")
            for row in rooms_table(seconds):
                terminalreporter.line(row)


def sum_phases(reports: Iterable[object]) -> dict[str, float]:
    """CPU seconds of each test: of setup, call and teardown."""
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        if isinstance(report, pytest.TestReport) and hasattr(report, "cpu_seconds"):
            seconds[report.nodeid] += report.cpu_seconds
    return dict(seconds)
