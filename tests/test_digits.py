"""The bar: from digits to a one-step student that is as good as the teacher at 16 Euler steps."""

import pytest
from runs import distill

from distill.store import RunPaths, read_json

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
    results = read_json(run.stage("evaluate").root / "results.json")
    fd = {row["label"]: row["metrics"]["FD-digits"] for row in results["rows"]}
    print(fd)
    student, coarse, fine = fd["one_step, 1 step"], fd["teacher, 16 steps"], fd["teacher, fine"]
    assert student <= coarse, fd
    assert student <= 2 * fine, fd
    assert fd["teacher, 16 steps"] < fd["teacher, 4 steps"], fd
    assert run.report.exists()
