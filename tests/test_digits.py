"""The bar: from digits to a one-step student that is as good as the teacher at 16 Euler steps."""

import pytest
from runs import distill

from distill.results import load
from distill.store import RunPaths

pytestmark = [pytest.mark.process, pytest.mark.train]


@pytest.mark.timeout(900)
def test_one_step_student_reaches_the_bar(tmp_path):
    # The preset as it ships, measured on 10,000 samples; the rows that the bar does not need are left out.
    done = distill(
        "run", "digits", "--store", "runs",
        "stages.evaluate.samples=10000",
        "stages.evaluate.teacher_steps=[4, 16]",
        "stages.evaluate.students={one_step: [1], reflow: [1]}",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunPaths(tmp_path / "runs" / "digits")
    results = load(run.stage("evaluate"))
    student = results.row("one_step", 1).distance
    coarse, fine = results.row("teacher", 16).distance, results.row("teacher", 16, fine=True).distance
    print(f"FD-digits: student {student:.2f}, teacher at 16 Euler steps {coarse:.2f}, by its fine solver {fine:.2f}")
    assert results.distance == "FD-digits"
    assert student <= coarse
    assert student <= 2 * fine
    assert coarse < results.row("teacher", 4).distance
    assert run.report.exists()
