"""The presets, run by the real command: the required quality on digits, and recovery of the ring."""

import pytest
from runs import distill
from safetensors.torch import load_file

from distill.runs.results import load_results
from distill.runs.run_store import RunPaths
from distill.students.exporting import WEIGHTS

pytestmark = [pytest.mark.process, pytest.mark.train]


def evaluated(folder, *arguments, timeout=1500):
    """The results of a run of a preset."""
    done = distill("run", *arguments, "--name", "one", "--store", "runs", cwd=folder, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunPaths(folder / "runs" / "one")
    assert run.report.exists()
    return load_results(run.stage("evaluate"))


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_one_step_student_of_digits_reaches_the_bar(tmp_path):
    # Measured on 10,000 samples; the rows that the bar does not need are left out. Three seeds: tests/benchmarks.
    results = evaluated(
        tmp_path,
        "digits",
        "stages.evaluate.samples=10000",
        "stages.evaluate.teacher_steps=[16]",
        "stages.evaluate.students={one_step: [1]}",
    )
    student, coarse = results.row("one_step", 1).distance, results.row("teacher", 16).distance
    fine = results.row("teacher", 24, fine=True).distance
    print(f"FD-digits: student {student:.2f}, teacher at 16 Euler steps {coarse:.2f}, by its fine solver {fine:.2f}")
    assert (results.distance, results.samples) == ("FD-digits", 10000)
    assert student <= coarse
    assert student <= 2 * fine


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_one_step_student_of_the_ring_recovers_it(tmp_path):
    results = evaluated(tmp_path, "mixture-2d", "stages.evaluate.students={one_step: [1]}")
    student, coarse = results.row("one_step", 1), results.row("teacher", 1)
    fine = results.row("teacher", 64, fine=True)
    assert results.distance == "SW2"
    assert student.distance - fine.distance <= 0.15 * (coarse.distance - fine.distance)
    assert student.rms <= 0.15 * coarse.rms


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_half_the_weights_do_in_one_step_what_their_teacher_does_in_four(tmp_path):
    changes = ("stages.evaluate.teacher_steps=[4]", "stages.evaluate.students={distill: [1]}")
    results = evaluated(tmp_path, "digits-slimflow", *changes)
    student, teacher = results.row("distill", 1).distance, results.row("teacher", 4).distance
    folders = [tmp_path / "runs" / "one" / "students" / name / "unet" for name in ("distill", "teach")]
    small, large = (sum(t.numel() for t in load_file(folder / WEIGHTS).values()) for folder in folders)
    print(f"FD-digits: student of {small} weights {student:.2f}, teacher of {large} at 4 Euler steps {teacher:.2f}")
    assert student <= teacher
    assert small <= large / 2


# A student at some number of steps, and the number of its teacher's Euler steps that it must do as well as: of one that
# is made for K steps, 4 K.
FAMILY = {
    ("reflow", 1): 8, ("one_step", 1): 16, ("rf_plus_plus", 1): 8, ("one_step_pp", 1): 16, ("simple_reflow", 1): 4,
    ("slimflow", 1): 4, ("rectified_diffusion", 1): 4, ("perflow", 4): 16, ("proreflow", 2): 8,
    ("consistency_fm", 2): 8, ("seqrf", 4): 16, ("boss", 4): 16, ("caf", 1): 4,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(8000)  # half an hour on two idle cores
def test_the_reflow_family_reaches_its_bars_on_digits(tmp_path):
    results = evaluated(tmp_path, "digits-family", timeout=7900)
    rows = {(row.network, row.steps): row.distance for row in results.rows if not row.fine}
    print({f"{name}, {steps}": round(distance, 2) for (name, steps), distance in rows.items()})
    assert {name for name, _ in rows} - {"teacher"} == {name for name, _ in FAMILY}
    missed = {of: rows[of] for of, coarse in FAMILY.items() if rows[of] > rows["teacher", coarse]}
    assert missed == {}
    for (name, steps), distance in rows.items():
        assert name == "teacher" or distance < rows["teacher", steps]


@pytest.mark.long
@pytest.mark.timeout(8000)  # half an hour on two idle cores
def test_six_recipes_beat_their_teacher_on_digits(tmp_path):
    results = evaluated(tmp_path, "digits-recipes", timeout=7900)
    rows = {(row.network, row.steps): row.distance for row in results.rows if not row.fine}
    students = {name for name, _ in rows} - {"teacher"}
    print({f"{name}, {steps}": round(distance, 2) for (name, steps), distance in rows.items()})
    assert len(students) == 6
    for name in students:
        assert rows[name, 1] <= rows["teacher", 8]
    for (name, steps), distance in rows.items():
        assert name == "teacher" or distance < rows["teacher", steps]
