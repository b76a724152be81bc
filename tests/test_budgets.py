"""CPU-time budgets: a run fails if a subject's tests are too slow, in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import budgets
import pytest

HERE = Path(__file__).parent

CONFTEST = """
import sys
sys.path.insert(0, {here!r})
import budgets
budgets.BUDGETS.update(recipe=0.2, teacher=0.2)
budgets.REFERENCE = {reference}
pytest_plugins = ["budgets"]
"""

TESTS = """
import subprocess, sys, time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture
def costly():
    work(0.15)

@pytest.mark.costs("recipe reflow/slow")
def test_setup_counts(costly):
    work(0.15)

@pytest.mark.costs("recipe reflow/quick", "teacher quick")
def test_of_two():
    work(0.3)

@pytest.mark.process
@pytest.mark.costs("teacher child")
def test_children_count():
    code = "import time\\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)

@pytest.mark.long
@pytest.mark.costs("teacher free")
def test_not_in_make_test():
    work(0.3)
"""

DECLARING = """
from types import SimpleNamespace
SUBJECTS = [SimpleNamespace(recipe="flow/one"), SimpleNamespace(recipe="flow/two")]

def test_of_both():
    pass
"""


def test_seconds_are_divided_among_owners():
    records = [(["recipe a", "recipe b"], 3.0), (["recipe a"], 2.0), ([], 9.0), (["teacher a"], 3.5)]
    total = budgets.spent(records)
    assert total == {"recipe a": 3.5, "recipe b": 1.5, "teacher a": 3.5}
    assert budgets.over(total) == [
        "the tests of teacher a took 3.5 CPU seconds (as on an idle machine); the budget of a teacher is 3: make them "
        "cheaper, or mark the slowest with pytest.mark.long"
    ]
    assert budgets.over({"recipe a": 4.0}) == []


def run(tmp_path, *workers, reference):
    """Runs the tests above. reference: the CPU seconds that the fixed work would take on an idle machine."""
    (tmp_path / "conftest.py").write_text(CONFTEST.format(here=str(HERE), reference=reference))
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text(DECLARING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long\n    process\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--strict-markers",
        "-p",
        "no:cacheprovider",
        "-q",
        *workers,
        str(tmp_path),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # we may be a worker
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.process
@pytest.mark.parametrize(
    "workers", [pytest.param([], id="alone"), pytest.param(["-n", "2"], id="workers", marks=pytest.mark.long)]
)
def test_what_is_over_its_budget_fails_the_run(tmp_path, workers):
    done = run(tmp_path, *workers, reference=100.0)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("the tests of")]
    assert [line.split(" took ")[0] for line in lines] == [
        "the tests of recipe reflow/slow",
        "the tests of teacher child",
    ]


@pytest.mark.process
def test_a_slow_machine_has_larger_budgets(tmp_path):
    done = run(tmp_path, reference=1e-3)  # this machine counts as some thirty times slower
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the tests of" not in done.stdout
