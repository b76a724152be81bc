"""A pytest plugin: CPU time of each test, the twenty slowest tests at the end of a run, and CPU-time budgets.

The tests of a recipe may take 4 CPU seconds in total, those of a teacher class 3. A run in which they take more fails.
Tests count for recipes and teacher classes as follows:

- a test in a file that declares SUBJECTS counts for the recipes declared there, divided equally;
- a test marked `costs("recipe NAME")` or `costs("teacher NAME")` counts for these, divided equally;
- tests marked `long` do not count, since they do not run in `make test`.

The CPU time includes setup, teardown and the child processes that the test waited for. Shared fixtures count for the
first test that uses them. On a machine that is slow, or shared with others, the same test needs more CPU time: a fixed
piece of work is timed while the tests run, and what a test took is divided by how much slower this work was than on an
idle machine of two cores (see REFERENCE).
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

import pytest

BUDGETS = {"recipe": 4.0, "teacher": 3.0}  # CPU seconds
SHOWN, SLOW = 20, 0.5  # a test is shown if it took at least SLOW seconds

REFERENCE = 0.017  # CPU seconds of fixed_work() on an idle machine of two cores
AGAIN = 5.0  # seconds after which the fixed work is timed again

STARTED = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """The CPU time that this process and the children it waited for have used."""
    return sum(os.times()[:4])


def fixed_work() -> float:
    """The CPU seconds of a loop that is always the same."""
    start, values = time.process_time(), dict.fromkeys(range(256), 0)
    for i in range(200_000):
        values[i % 256] += i
    return time.process_time() - start


def owners(item: pytest.Item) -> list[str]:
    """For whom a test counts: "recipe NAME" or "teacher NAME"."""
    if item.get_closest_marker("long"):
        return []
    named = [name for marker in item.iter_markers("costs") for name in marker.args]
    declared = vars(item.module).get("SUBJECTS", [])
    return named or [f"recipe {subject.recipe}" for subject in declared]


def spent(records: Iterable[tuple[list[str], float]]) -> dict[str, float]:
    """The CPU seconds of each owner. records: of each test, its owners and its CPU seconds on an idle machine."""
    total: dict[str, float] = defaultdict(float)
    for names, seconds in records:
        for name in names:
            total[name] += seconds / len(names)
    return dict(total)


def over(total: Mapping[str, float]) -> list[str]:
    """One line for each owner that is over its budget."""
    return [
        f"the tests of {name} took {seconds:.1f} CPU seconds (as on an idle machine); the budget of a {kind} is "
        f"{BUDGETS[kind]:g}: make them cheaper, or mark the slowest with pytest.mark.long"
        for name, seconds in sorted(total.items())
        if seconds > BUDGETS[kind := name.split()[0]]
    ]


class Recorder:
    """Measures the tests that run in this process."""

    def __init__(self) -> None:
        self.slowness, self.timed = 1.0, -AGAIN

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item):
        if owners(item) and time.monotonic() > self.timed + AGAIN:
            self.slowness, self.timed = max(1.0, fixed_work() / REFERENCE), time.monotonic()
        item.stash[STARTED] = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item):
        try:
            return (yield)
        finally:  # properties of a test travel with its reports, from the workers of xdist too
            seconds = cpu_seconds() - item.stash[STARTED]
            item.user_properties += [("cpu", seconds), ("budgeted", seconds / self.slowness)]
            item.user_properties.append(("owners", owners(item)))


class Summary:
    """Collects what was measured in all processes, and judges it."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = {}
        self.records: list[tuple[list[str], float]] = []

    def pytest_runtest_logreport(self, report):
        self.wall[report.nodeid] += report.duration
        if report.when == "teardown":
            found = dict(report.user_properties)
            self.cpu[report.nodeid] = found["cpu"]
            self.records.append((found["owners"], found["budgeted"]))

    def total(self) -> dict[str, float]:
        return spent(self.records)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if over(self.total()) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        slow = [test for test in self.cpu if max(self.cpu[test], self.wall[test]) >= SLOW]
        slow.sort(key=lambda test: -max(self.cpu[test], self.wall[test]))
        if slow:
            terminalreporter.section(f"slowest {SHOWN} tests: CPU seconds, seconds")
        for test in slow[:SHOWN]:
            terminalreporter.line(f"{self.cpu[test]:6.2f} {self.wall[test]:6.2f}  {test}")
        for line in over(self.total()):
            terminalreporter.line(line, red=True)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", 'costs("recipe NAME", "teacher NAME"): whose budget of CPU time a test counts in'
    )
    config.pluginmanager.register(Recorder())
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Summary())
