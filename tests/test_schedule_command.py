"""The command `distill schedule`, and the step times of `sample` and `eval`."""

import json
import math

import pytest
import torch
from commands import command
from safetensors.torch import load_file

from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.networks.architectures import build, two_times
from distill.networks.flow_map import FlowMapStudent
from distill.networks.velocity import VelocityStudent
from distill.spec.model import MlpSpec
from distill.students import loaded, step_times
from distill.students.exporting import export
from distill.students.samplers import euler

STD = math.sqrt(0.3)
TEACHER = f"{{kind: gaussian, mean: [0.0, 0.0], std: [{STD}, {STD}]}}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    network = build(MlpSpec(kind="mlp", width=8, depth=1), (2,), None, seed=0)
    facts = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="0" * 64, teacher_digest=None, num_classes=None,
        null_class=None, shape=(2,), weights="raw", images=1,
    )  # fmt: skip
    export(VelocityStudent(network), tmp_path / "student", facts)
    own = facts.model_copy(update={"t_grids": {3: [1.0, 0.9, 0.5, 0.0]}})
    export(VelocityStudent(network), tmp_path / "own", own)
    flow_map = facts.model_copy(update={"kind": "flow_map", "sampler": "jump"})
    export(FlowMapStudent(two_times(network, 0)), tmp_path / "map", flow_map)
    return tmp_path


def test_the_times_are_found_told_and_kept(capfd, here, monkeypatch):
    asked = ["schedule", TEACHER, "--steps", "3", "--fine", "12", "--samples", "20"]
    first = command(capfd, *asked)
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].startswith("euler, 3 steps of ")
    assert lines[0].endswith(", chosen from a grid of 12 with errors measured on 20 paths")
    assert lines[1] == "times: 1, 0.5, 0.25, 0"
    assert lines[2].startswith("sum of squared errors: 0.0") and "; with uniform steps: 0.0" in lines[2]
    monkeypatch.setattr(step_times, "measure", None)  # not measured again
    assert command(capfd, *asked).out == first.out
    found = json.loads(command(capfd, *asked, "--json").out)
    assert found["times"] == [1.0, 0.5, 0.25, 0.0]
    assert 0 < found["cost"] < found["uniform_cost"]
    assert (found["solver"], found["steps"], found["fine"], found["samples"], found["seed"]) == ("euler", 3, 12, 20, 0)
    assert found["criterion"] == "error"
    assert [path.name for path in here.joinpath("runs").iterdir()] == ["schedules"]


def test_any_solver_has_its_own(capfd, here):
    asked = ["schedule", TEACHER, "--steps", "3", "--fine", "12", "--samples", "20", "--json", "--solver"]
    found = {name: json.loads(command(capfd, *asked, name).out) for name in ("euler", "heun", "dpm_solver_pp_2m")}
    assert len({tuple(each["times"]) for each in found.values()} | {each["cost"] for each in found.values()}) > 3
    assert found["heun"]["cost"] < found["euler"]["cost"]


def test_the_criterion_of_align_your_steps(capfd, here):
    asked = ["schedule", TEACHER, "--steps", "2", "--fine", "16", "--samples", "50", "--criterion", "ays"]
    lines = command(capfd, *asked).out.splitlines()
    assert lines[0].startswith("ays, 2 steps of ")
    assert lines[0].endswith(", chosen from a grid of 16 with AYS costs measured on 50 paths")
    assert lines[1] == "times: 1, 0.1875, 0"
    assert lines[2].startswith("sum of AYS costs: ") and "; with uniform steps: " in lines[2]
    found = json.loads(command(capfd, *asked, "--json").out)
    assert (found["criterion"], found["solver"]) == ("ays", None)
    assert found["times"] == [1, 3 / 16, 0]
    assert found["cost"] < found["uniform_cost"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["schedule", TEACHER, "--steps", "13", "--fine", "12"],
            "--steps 13 is more than --fine 12, the steps of the grid from which times are chosen; use fewer steps, or",
        ),
        (["schedule", TEACHER, "--steps", "2", "--solver", "heum"], "unknown solver 'heum': did you mean 'heun'?"),
        (["schedule", "nowhere", "--steps", "2"], "nowhere"),
        (
            ["schedule", TEACHER, "--steps", "2", "--criterion", "eror"],
            "unknown criterion 'eror': did you mean 'error'? valid: ays, error",
        ),
        (
            ["schedule", TEACHER, "--steps", "2", "--criterion", "ays", "--solver", "heun"],
            "solver heun: no effect with the criterion ays",
        ),
        (
            ["sample", "student", "--out", "a.png", "--schedule", "best"],
            "--schedule best: valid: bns, optimal, uniform",
        ),
        (
            ["sample", "student", "--out", "a.png", "--times", "1,0.5"],
            "--times 1,0.5: times must decrease from 1 to 0, like",
        ),
        (
            ["sample", "student", "--out", "a.png", "--times", "1,a"],
            "--times 1,a: give numbers separated by commas, like",
        ),
        (
            ["sample", "student", "--out", "a.png", "--times", "1,0", "--schedule", "optimal"],
            "--schedule optimal and --times both set the times; leave one out",
        ),
        (
            ["sample", "student", "--out", "a.png", "--times", "1,0", "--steps", "1"],
            "--steps: no effect with --times",
        ),
        (
            ["sample", "own", "--out", "a.png", "--times", "1,0"],
            "--times: this student supports only its own step times; remove this option",
        ),
        (["sample", "own", "--out", "a.png", "--steps", "2"], "steps: this student supports only 3 steps, not 2"),
        (
            ["sample", "map", "--out", "a.png", "--schedule", "optimal"],
            "--schedule: this student is not a velocity field",
        ),
        (
            ["eval", "own", "--out", "e", "--teacher", TEACHER, "--data", "none", "--steps", "2"],
            "supports only 3 steps",
        ),
    ],
)
def test_what_cannot_be_is_said(capfd, here, arguments, message):
    done = command(capfd, *arguments)
    assert done.code == 2 and message in done.err, done.err
    assert not (here / "a.png").exists()


def test_a_student_is_sampled_along_other_times(capfd, here):
    student = loaded.load_student(here / "student", torch.device("cpu"))

    def drawn(*options):
        done = command(capfd, "sample", "student", "--out", "a.safetensors", "--count", "5", *options)
        assert done.code == 0, done.err
        return load_file("a.safetensors"), done.out

    given, said = drawn("--times", "1,0.6,0")
    assert "5 samples at 2 steps" in said
    grid = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(given["samples"], euler.sample(student.student, given["latents"], grid, {}))
    found, _ = drawn("--schedule", "optimal", "--steps", "2")
    best = step_times.optimal_times(student, here / "runs", 2, torch.device("cpu"))
    with torch.no_grad():
        expected = euler.sample(student.student, given["latents"], torch.tensor(best, dtype=torch.float64), {})
    assert torch.equal(found["samples"], expected)


@pytest.mark.long
def test_an_evaluation_has_rows_along_other_times(capfd, here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    asked = [
        "--teacher",
        TEACHER,
        "--data",
        "none",
        "--samples",
        "64",
        "--steps",
        "2",
        "--teacher-steps",
        "2,3",
        "--baselines",
        "none",
    ]
    done = command(capfd, "eval", "student", "--out", "e", *asked, "--schedule", "optimal", "--json")
    assert done.code == 0, done.err
    rows = [(r["network"], r["steps"], r["along"]) for r in json.loads(done.out)["rows"] if not r["fine"]]
    usual = [("teacher", 2, ""), ("teacher", 3, ""), ("teacher", 2, "optimal"), ("teacher", 3, "optimal")]
    assert rows == [*usual, ("student", 2, ""), ("student", 2, "optimal")]
    done = command(capfd, "eval", "map", "--out", "m", *asked, "--times", "1,0.6,0")
    assert done.code == 0, done.err
    assert "teacher, euler, along 1, 0.6, 0" in done.out
    assert "student, along" not in done.out, "a flow map is not measured along other times"


def test_by_default_a_student_is_measured_at_its_own_numbers_of_steps(capfd, here):
    asked = ["--teacher", TEACHER, "--data", "none", "--samples", "64", "--teacher-steps", "2"]
    done = command(capfd, "eval", "own", "--out", "e", *asked, "--json")
    assert done.code == 0, done.err
    assert [r["steps"] for r in json.loads(done.out)["rows"] if r["role"] == "student"] == [3]
    done = command(capfd, "sample", "own", "--out", "a.png", "--count", "4")
    assert "4 samples at 3 steps" in done.out
    assert student_card.read(here / "own").fewest_steps == 3
