"""Evaluation: known results for a closed-form teacher, the same noise for all rows; a kill loses at most one row."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from distill.core.errors import InputError, RunError, Stopped
from distill.core.stop import StopRequest
from distill.data.arrays import ArrayData
from distill.evaluation import charts, measuring, report_page, row_plans, row_work, sample
from distill.evaluation.measuring import evaluate
from distill.evaluation.metrics import features
from distill.evaluation.pictures import columns_for, images_png, scatter_png
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.execution import sources
from distill.flow import dopri5, solvers
from distill.flow.draws import key, sample_labels, sample_noise
from distill.flow.times import uniform_grid
from distill.networks.acceleration import AccelerationStudent
from distill.networks.architectures import accelerated, build, two_times
from distill.networks.flow_map import FlowMapStudent
from distill.networks.velocity import VelocityStudent
from distill.networks.velocity_mlp import VelocityMLP
from distill.runs import results
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec import checks
from distill.spec.evalspec import num_samples
from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.model import CheckpointTeacher, RunSpec, UNetSpec
from distill.spec.resolved import resolve
from distill.students import fitting, sampling, step_times
from distill.students.exporting import export
from distill.students.loaded import load_student
from distill.students.samplers import euler, renoise
from distill.teachers import load_teacher

CPU = torch.device("cpu")
STD, MEAN = 0.5, [1.0, -2.0]


def card(shape: tuple[int, ...], classes: int | None) -> StudentCard:
    return StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="0" * 64, teacher_digest=None, num_classes=classes,
        null_class=classes, shape=shape, weights="raw", images=1,
    )  # fmt: skip


def one_step_student() -> VelocityStudent:
    """The exact velocity at t = 1 of the straight coupling: data = MEAN + STD noise, so v = noise - data there."""
    network = VelocityMLP(dim=2, width=4, depth=1)
    for parameter in network.parameters():
        parameter.data.zero_()
    # SiLU(a) - SiLU(-a) = a for every a: a linear layer of width 4 passes both coordinates through
    with torch.no_grad():
        for i in range(2):
            network.layers[0].weight[2 * i, i], network.layers[0].weight[2 * i + 1, i] = 1, -1
            network.layers[2].weight[i, 2 * i], network.layers[2].weight[i, 2 * i + 1] = 1 - STD, STD - 1
            network.layers[2].bias[i] = -MEAN[i]
    return VelocityStudent(network)


def vector_spec(**changes) -> RunSpec:
    stage = {"kind": "evaluate", "students": {"exact": [1, 2]}, "teacher_steps": [1, 8], "samples": 300, "block": 100}
    return RunSpec.model_validate(
        {
            "name": "r",
            "teacher": {"kind": "gaussian", "mean": MEAN, "std": [STD, STD]},
            "stages": {"evaluate": {**stage, "fine_steps": 32, "baselines": [], **changes}},
        }
    )


@pytest.fixture
def vector_run(tmp_path) -> RunPaths:
    run = RunPaths(tmp_path / "r")
    export(one_step_student(), run.student("exact"), card((2,), None))
    return run


def go(run: RunPaths, spec: RunSpec, stop: StopRequest | None = None) -> results.Results:
    run.stage("evaluate").root.mkdir(parents=True, exist_ok=True)
    stage = spec.stages["evaluate"]
    inputs = sources.load(run, resolve(spec, run.root), "evaluate", CPU, indexed=False)
    seed, stop = key(spec.seed, "evaluate"), stop or StopRequest()
    total = num_samples(stage, {name: student_card.read(run.student(name)).sampler for name in stage.students})
    with Progress("evaluate", total, "samples", run) as progress:
        given = inputs.teacher, inputs.own, inputs.data
        found = evaluate(run, "evaluate", stage, *given, seed=seed, device=CPU, progress=progress, stop=stop)
    fitted = sum(row.solver == "bns" for row in found.rows)
    assert progress.done == total + fitted * stage.samples
    return found


def test_gaussian_teacher_has_its_known_numbers(vector_run):
    found = go(vector_run, vector_spec())
    assert [(row.network, row.steps, row.nfe) for row in found.rows] == [
        ("teacher", 1, 1), ("teacher", 8, 8), ("teacher", 32, 63), ("exact", 1, 1), ("exact", 2, 2),
    ]  # fmt: skip
    one, eight, fine = found.row("teacher", 1), found.row("teacher", 8), found.row("teacher", 32, fine=True)
    student = found.row("exact", 1)
    assert fine.rms == 0
    # One Euler step of a Gaussian's velocity goes to the mean: x = MEAN, whatever the noise. The ODE's own end is
    # MEAN + STD noise.
    noise = sample_noise(key(0, "evaluate"), range(300), (2,))
    assert one.rms == pytest.approx((STD * noise).double().square().mean().sqrt().item(), rel=0.01)
    assert one.recall == 0
    assert student.rms < 2e-3, "the student knows the coupling exactly; what is left is the fine solver's error"
    assert eight.rms > 10 * student.rms
    # Straightness of the Gaussian's ODE: per coordinate STD (2 - pi/2); the straight student's is 0 for its own steps
    assert one.straightness == fine.straightness == pytest.approx(STD * (2 - math.pi / 2), rel=0.15)
    assert found.distance == "SW2"
    assert found.floor is not None
    assert student.distance < 3 * found.floor + 0.02
    assert one.distance == pytest.approx(STD, rel=0.2)  # of a point from N(., STD^2)
    assert abs(student.kid) < abs(one.kid) / 5
    assert found.vector
    on_disk = results.load_results(vector_run.stage("evaluate"))
    assert on_disk == found
    assert results.of_run(vector_run) == {"evaluate": found}


def test_samples_do_not_depend_on_the_block_and_rows_share_their_noise(vector_run):
    teacher = load_teacher(vector_spec().teacher, CPU)
    method = sampling.of_teacher(teacher, "euler", 4, UNCHANGED)
    whole, parts = (
        torch.cat([b.samples for b in sampling.blocks(method, teacher, seed=3, count=10, block=n, device=CPU)])
        for n in (10, 4)
    )
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)
    noise = sample_noise(3, range(10), (2,))
    torch.testing.assert_close(whole, sampling.of_teacher(teacher, "euler", 4, UNCHANGED).generate(noise, {}, []))


def test_a_stop_costs_one_row_and_the_rest_is_the_same(vector_run, tmp_path):
    spec, folder = vector_spec(teacher_steps=[1]), vector_run.stage("evaluate").root
    undisturbed = go(vector_run, spec)
    for left in ("results.json", "rows/student-exact-euler-2.json"):
        (folder / left).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    request = StopRequest()
    request.signal = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM; saved: the finished rows of the evaluation"):
        go(vector_run, spec, request)  # the endpoint was dropped at the end: it is made again
    assert not (folder / "results.json").exists()
    again = go(vector_run, spec)
    changed = {p.name for p in (folder / "rows").iterdir() if kept.get(p.name) != p.stat().st_mtime_ns}
    assert changed == {"teacher-heun-32.json", "student-exact-euler-2.json"}
    assert [timeless(row) for row in again.rows] == [timeless(row) for row in undisturbed.rows]
    assert not (folder / "endpoint.safetensors").exists()


def test_a_row_is_measured_again_when_its_student_changes(vector_run):
    spec = vector_spec(students={"exact": [1]}, teacher_steps=[8])
    before = go(vector_run, spec)
    changed = one_step_student()
    with torch.no_grad():
        changed.network.layers[2].bias[0] += 1
    export(changed, vector_run.student("exact"), card((2,), None))
    after = go(vector_run, spec)
    assert timeless(after.row("teacher", 8)) == timeless(before.row("teacher", 8))
    assert after.row("exact", 1).rms == pytest.approx(math.sqrt(0.5), rel=0.01)


def test_a_student_is_measured_along_its_own_times(vector_run):
    spec, own = vector_spec(students={"exact": [2]}, teacher_steps=[]), card((2,), None)
    uniform = go(vector_run, spec).row("exact", 2)
    for times in ([1.0, 0.9, 0.0], [1.0, 0.4, 0.0]):  # the same weights, other numbers
        export(one_step_student(), vector_run.student("exact"), own.model_copy(update={"t_grids": {2: times}}))
        found = go(vector_run, spec).row("exact", 2)
        # v = (1 - STD) x - MEAN at every t, so a step from t to s is affine
        noise = sample_noise(key(0, "evaluate"), range(300), (2,)).double()
        mean, gap = torch.tensor(MEAN, dtype=torch.float64), times[1] - 1
        x = noise + gap * ((1 - STD) * noise - mean)
        x = x - times[1] * ((1 - STD) * x - mean)
        expected = (x - (mean + STD * noise)).square().mean().sqrt().item()
        assert found.rms == pytest.approx(expected, abs=1e-3), "the fine solver's error aside"
        assert abs(found.rms - uniform.rms) > 5e-3
    with pytest.raises(InputError, match="^students.exact: this student supports only 2 steps, not 3"):
        go(vector_run, vector_spec(students={"exact": [2, 3]}))


@pytest.mark.long
def test_rows_along_other_times(vector_run):
    """Of the teacher by Euler and of a velocity student; the optimal ones are those that the store keeps."""
    times = {"teacher": ["optimal", [1.0, 0.5, 0.2, 0.0]], "exact": [[1.0, 0.3, 0.0]]}
    spec = vector_spec(times=times, teacher_steps=[1, 4])
    found = go(vector_run, spec)
    ways = [(row.network, row.solver, row.steps, row.along) for row in found.rows if not row.fine]
    teacher = [("teacher", "euler", n, along) for n, along in ((1, ""), (4, ""), (1, "optimal"), (4, "optimal"))]
    given = [("teacher", "euler", 3, "1, 0.5, 0.2, 0")]
    assert ways == [*teacher, *given, *(("exact", "euler", n, "") for n in (1, 2)), ("exact", "euler", 2, "1, 0.3, 0")]
    # The path of a centred Gaussian scales its state, so the row's RMS is that of noise times an error that is known.
    loaded = load_teacher(spec.teacher, CPU)
    best = step_times.optimal_times(loaded, vector_run.root.parent, 4, CPU)
    noise = sample_noise(key(0, "evaluate"), range(300), (2,))
    fine = solvers.solve(loaded.field, noise, {}, solver="heun", steps=32)
    for along, steps in (("optimal", best), ("1, 0.5, 0.2, 0", [1.0, 0.5, 0.2, 0.0])):
        x = euler.sample(loaded.field, noise, torch.tensor(steps, dtype=torch.float64), {})
        row = found.row("teacher", len(steps) - 1, along=along)
        assert row.rms == pytest.approx((x - fine).square().mean().sqrt().item(), rel=1e-4)
        assert row.nfe == len(steps) - 1
    assert found.row("teacher", 4, along="optimal").rms != found.row("teacher", 4).rms
    assert len({row.picture for row in found.rows}) == len(found.rows)
    with pytest.raises(InputError, match=r"times 1, 0.5, 0.5, 0: must decrease from 1 to 0; times in between"):
        go(vector_run, vector_spec(times={"teacher": [[1.0, 0.5, 0.5, 0.0]]}))
    own = card((2,), None).model_copy(update={"t_grids": {1: [1.0, 0.0], 2: [1.0, 0.9, 0.0]}})
    export(one_step_student(), vector_run.student("exact"), own)
    with pytest.raises(
        InputError, match="times.exact: this student supports only its own step times; remove this option"
    ):
        go(vector_run, spec)
    found = go(vector_run, vector_spec(students={"exact": [1]}, teacher_steps=[]))
    assert found.row("exact", 1).straightness is None, "it was never shown the times between its own"


@pytest.mark.long
def test_the_teacher_is_measured_with_further_solvers(vector_run):
    """Stochastic ones too. The rows that are there already are not measured again."""
    before = go(vector_run, vector_spec(students={"exact": [1]}))
    spec = vector_spec(students={"exact": [1]}, teacher_solvers={"restart": [6, 18], "sa": [8]})
    found = go(vector_run, spec)
    assert [(row.label, row.steps, row.nfe) for row in found.rows] == [
        ("teacher, euler", 1, 1), ("teacher, euler", 8, 8),
        ("teacher, restart", 6, 19), ("teacher, restart", 18, 43), ("teacher, sa", 8, 8),
        ("teacher, heun", 32, 63), ("exact", 1, 1),
    ]  # fmt: skip
    assert [row for row in found.rows if row.solver == "euler"] == [row for row in before.rows if not row.fine]
    restarted, stochastic = found.rows[3], found.rows[4]
    fresh = sampling.fresh_noises(key(0, "evaluate"), range(300), (2,), 8)
    noise = sample_noise(key(0, "evaluate"), range(300), (2,))
    field = load_teacher(spec.teacher, CPU).field
    fine = solvers.solve(field, noise, {}, solver="heun", steps=32)
    for row, given in ((restarted, fresh[:2]), (stochastic, fresh)):
        samples = solvers.solve(field, noise, {}, solver=row.solver, steps=row.steps, fresh=given)
        assert row.rms == pytest.approx((samples - fine).square().mean().sqrt().item(), rel=1e-4)
    assert restarted.distance < 3 * found.floor + 0.02
    drawn = charts.quality(found)
    assert "teacher, sa" in drawn and "teacher, restart" in drawn


def test_a_fine_solver_with_a_tolerance(vector_run):
    """Its calls are those that were made; another tolerance is another reference, so rows are measured again."""
    few = {"students": {"exact": [1]}, "teacher_steps": [8], "fine_steps": 16, "fine_solver": "dopri5"}
    found = go(vector_run, vector_spec(**few, fine_tolerance=1e-5, fine_students=["exact"]))
    row = found.row("teacher", 5, fine=True)
    noise = sample_noise(key(0, "evaluate"), range(300), (2,))
    _, calls = dopri5.solve_adaptive(load_teacher(vector_spec().teacher, CPU).field, noise, {}, tolerance=1e-5)
    assert row.label == "teacher, dopri5" and row.rms == 0 and row.picture == "pictures/teacher-dopri5-1e-05.png"
    assert (row.nfe, row.most_calls) == (math.ceil(calls.double().mean().item()), calls.max().item())
    assert results.cells(found, row)[0] == f"{row.nfe} (at most {row.most_calls})"
    assert [each.most_calls for each in found.rows if not each.fine] == [None, None]
    exact = torch.tensor(MEAN) + STD * noise
    assert row.transport == pytest.approx((exact - noise).square().mean().item(), rel=1e-4)
    straight = next(each for each in found.rows if each.fine and each.role == "student")
    assert straight.most_calls == straight.nfe == 1 + 6 * straight.steps
    other = go(vector_run, vector_spec(**few, fine_tolerance=1e-2))
    assert other.row("teacher", 8).rms != found.row("teacher", 8).rms


def test_a_flow_is_measured_by_the_fine_solver_too(vector_run):
    found = go(vector_run, vector_spec(fine_students=["exact"], teacher_steps=[]))
    assert [(row.label, row.role, row.steps, row.nfe, row.fine) for row in found.rows] == [
        ("teacher, heun", "teacher", 32, 63, True), ("exact", "student", 1, 1, False),
        ("exact", "student", 2, 2, False),
        ("exact, heun", "student", 32, 63, True),
    ]  # fmt: skip
    own, one, _, fine = found.rows
    # dx/dt = a x - MEAN with a = 1 - STD from t = 1 to 0
    noise, mean, a = sample_noise(key(0, "evaluate"), range(300), (2,)).double(), torch.tensor(MEAN).double(), 1 - STD
    end, exact = math.exp(-a) * noise + mean * (1 - math.exp(-a)) / a, mean + STD * noise
    assert fine.rms == pytest.approx((end - exact).square().mean().sqrt().item(), rel=1e-3)
    assert one.transport == pytest.approx((exact - noise).square().mean().item(), rel=1e-5)
    assert own.transport == pytest.approx(one.transport, rel=2e-3), "the fine solver's error aside"
    assert fine.transport == pytest.approx((end - noise).square().mean().item(), rel=1e-3)
    assert fine.straightness == one.straightness


def test_rows_of_an_earlier_version_can_be_read(vector_run):
    found = go(vector_run, vector_spec(students={"exact": [1]}, teacher_steps=[]))
    path = vector_run.stage("evaluate").root / results.FILE_NAME
    content = json.loads(path.read_text())
    for row in content["rows"]:
        del row["transport"]
    path.write_text(json.dumps(content))
    again = results.load_results(vector_run.stage("evaluate"))
    assert {row.transport for row in again.rows} == {None}
    assert [timeless(row) | {"transport": 0} for row in again.rows] == [
        timeless(row) | {"transport": 0} for row in found.rows
    ]


def timeless(row: results.Row) -> dict:
    return row.model_dump(exclude={"images_per_second"})


def test_straightness_is_measured_in_blocks(vector_run):
    """The mean over all of the first 256, whatever the block; no more than a block is in memory."""
    few = {"students": {"exact": [1]}, "teacher_steps": [1]}
    whole, parts = (go(vector_run, vector_spec(block=n, **few)).row("teacher", 1).straightness for n in (300, 100))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_baselines_are_measured_at_the_students_numbers_of_calls(vector_run):
    """Each solver once per number of calls; the rows are known by hand, as one step of any solver is Euler's."""
    asked = {"students": {"exact": [1, 2, 4]}, "teacher_steps": [2], "baselines": ["euler", "ab3", "heun"]}
    found = go(vector_run, vector_spec(**asked))
    rows = [(row.solver, row.steps, row.nfe) for row in found.rows if row.role == "teacher"]
    assert rows == [
        ("euler", 2, 2), ("euler", 1, 1), ("euler", 4, 4), ("ab3", 2, 2), ("ab3", 4, 4), ("heun", 2, 3),
        ("heun", 32, 63),
    ]  # fmt: skip
    teacher, noise = load_teacher(vector_spec().teacher, CPU), sample_noise(key(0, "evaluate"), range(300), (2,))
    fine = solvers.solve(teacher.field, noise, {}, solver="heun", steps=32)
    for row in found.rows[:-4]:
        own = solvers.solve(teacher.field, noise, {}, solver=row.solver, steps=row.steps)
        assert row.rms == pytest.approx((own - fine).square().mean().sqrt().item(), rel=1e-4)
    best = min(found.rows[:3] + found.rows[3:6], key=lambda row: row.value)
    assert found.baseline(found.row("exact", 4)) == best and found.baseline(found.row("exact", 1)).solver == "euler"
    assert results.card_metrics(found, "exact")["best baseline SW2@4"] == float(f"{best.distance:.6g}")


def test_rows_of_the_teacher_are_shared_by_the_runs_of_a_store(vector_run, tmp_path, monkeypatch):
    spec = vector_spec(students={"exact": [2]}, teacher_steps=[4], baselines=["ab3"])
    first, folder = go(vector_run, spec), tmp_path / "baselines"
    assert len(list(folder.glob("*.json"))) == len(list(folder.glob("*.png"))) == 2
    other, made = RunPaths(tmp_path / "other"), []
    export(one_step_student(), other.student("exact"), card((2,), None))
    blocks = sampling.blocks
    monkeypatch.setattr(row_work, "blocks", lambda method, *a, **k: made.append(method.nfe) or blocks(method, *a, **k))
    again = go(other, spec)
    assert again.rows[:2] == first.rows[:2], "to the last digit of the speed"
    assert {63, 2} == set(made) - {1}, "the fine row and the student alone, besides their warm-up"
    pictures = [(run.stage("evaluate").root / again.rows[0].picture).read_bytes() for run in (vector_run, other)]
    assert pictures[0] == pictures[1]
    for path in folder.glob("*.json"):
        path.write_text("{")
    third = RunPaths(tmp_path / "third")
    export(one_step_student(), third.student("exact"), card((2,), None))
    assert [timeless(row) for row in go(third, spec).rows] == [timeless(row) for row in first.rows]


@pytest.mark.long
def test_a_fitted_solver_of_the_store_is_a_baseline(vector_run, tmp_path):
    """One step, fitted to a Gaussian, is exact: no student can do better."""
    spec = vector_spec(students={"exact": [1, 2]}, teacher_steps=[])
    teacher = load_teacher(spec.teacher, CPU)
    fitting.find(teacher, tmp_path, 1, device=CPU, samples=64)
    student = load_student(vector_run.student("exact"), CPU)
    plans = row_plans.plans(spec.stages["evaluate"], teacher, {"exact": student}, tmp_path, CPU)
    assert all(plan.solver != "bns" for plan in plans), "no baselines are asked for"
    found = go(vector_run, vector_spec(students={"exact": [1, 2]}, teacher_steps=[], baselines=["euler"]))
    (row,) = [row for row in found.rows if row.solver == "bns"]
    assert (row.steps, row.nfe, row.role) == (1, 1, "teacher") and row.rms < 2e-3
    assert found.baseline(found.row("exact", 1)) is row


def test_student_that_makes_no_numbers_is_named(vector_run):
    student = load_student(vector_run.student("exact"), CPU)
    student.network.layers[2].bias.data[1] = float("inf")
    blocks = sampling.blocks(
        sampling.of_student(student, uniform_grid(1)), student, seed=0, count=4, block=4, device=CPU
    )
    with pytest.raises(RunError, match="sample 0 of VelocityMLP from .* contains values that are not finite"):
        next(blocks)


def test_guided_teacher_counts_twice():
    network = build(UNetSpec(kind="unet", channels=[8]), (1, 8, 8), 2, 0)
    student = VelocityStudent(network)
    teacher = exported(student, (1, 8, 8), 2)
    assert sampling.of_teacher(teacher, "heun", 4, FieldSettings(2.0)).nfe == 14
    assert sampling.of_teacher(teacher, "heun", 4, UNCHANGED).nfe == 7


def test_the_teacher_is_measured_at_other_guidance_scales(image_run):
    """Each has the samples of a fine solver at that scale; they are no baselines, and no point of the chart."""
    run, spec, _ = image_run

    def at(scale, *others):
        changed = spec.model_dump(mode="json")
        few = {"students": {}, "teacher_steps": [], "baselines": []}
        changed["stages"]["evaluate"] |= {"guidance_scale": scale, "guidance_scales": others, **few}
        return go(run, RunSpec.model_validate(changed))

    found, guided = at(1.0, 2.0), at(2.0)
    row, fine = found.row("teacher", 2, guidance_scale=2.0), guided.row("teacher", 2, fine=True)
    assert (row.label, row.nfe, row.fine) == ("teacher, heun, guidance 2", 6, False)
    assert (row.distance, row.transport) == (fine.distance, fine.transport)
    assert row.rms > 0 and found.row("teacher", 2, fine=True).rms == 0
    assert row not in found.usual
    twice = vector_spec(guidance_scales=[2.0, 2.0])
    with pytest.raises(InputError, match="guidance_scales: 2 is measured already; list each other scale once"):
        checks.check(twice, run.root)


def exported(student: VelocityStudent, shape, classes):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        export(student, Path(folder) / "s", card(shape, classes))
        return load_teacher(CheckpointTeacher(path=str(Path(folder) / "s")), CPU)


# --- flow maps ---


def flow_map_card(sampler: str) -> StudentCard:
    return StudentCard.model_validate(card((2,), None).model_dump() | {"kind": "flow_map", "sampler": sampler})


@pytest.fixture
def flow_map_run(tmp_path) -> RunPaths:
    """The exact student as a flow map, once for each sampler: from t = 1 it is exact, whatever s."""
    run = RunPaths(tmp_path / "r")
    for sampler in ("jump", "renoise"):
        student = FlowMapStudent(two_times(one_step_student().network, 0))
        export(student, run.student(sampler), flow_map_card(sampler))
    return run


@pytest.mark.long
def test_flow_maps_are_measured_by_their_own_samplers(flow_map_run):
    found = go(flow_map_run, vector_spec(students={"jump": [1, 2], "renoise": [1, 2]}))
    rows = [(row.network, row.solver, row.steps, row.nfe) for row in found.rows if row.role == "student"]
    assert rows == [
        ("jump", "jump", 1, 1),
        ("jump", "jump", 2, 2),
        ("renoise", "renoise", 1, 1),
        ("renoise", "renoise", 2, 2),
    ]
    for name in ("jump", "renoise"):
        assert found.row(name, 1).rms < 2e-3
    # From the data m + s n the fresh noise z makes x = (m + s n + z) / 2, and x - u / 2 = (m + (1 + s) x) / 2
    noise = sample_noise(found.seed, range(300), (2,)).double()
    (fresh,) = sampling.fresh_noises(found.seed, range(300), (2,), 1)
    mean = torch.tensor(MEAN, dtype=torch.float64)
    expected = (mean + (1 + STD) * (mean + STD * noise + fresh) / 2) / 2
    rms = (expected - mean - STD * noise).square().mean().sqrt().item()
    assert found.row("renoise", 2).rms == pytest.approx(rms, rel=1e-3)
    assert {row.straightness for row in found.rows if row.role == "student"} == {None}, "their velocity is not known"
    assert found.row("teacher", 1).straightness > 0.1
    assert "straightness@1" not in results.card_metrics(found, "jump")
    assert results.load_results(flow_map_run.stage("evaluate")) == found
    assert "\u2013" in report_page.write(flow_map_run).read_text()


def test_a_velocity_with_its_acceleration_costs_one_call_more_than_it_has_steps(tmp_path):
    """With the exact first velocity and no acceleration it is exact."""
    run, network = RunPaths(tmp_path / "r"), accelerated(one_step_student().network, 0)
    with torch.no_grad():
        for parameter in network.acceleration.parameters():
            parameter.zero_()
    facts = card((2,), None).model_dump() | {"kind": "acceleration", "sampler": "accelerated"}
    export(AccelerationStudent(network), run.student("bent"), StudentCard.model_validate(facts))
    found = go(run, vector_spec(students={"bent": [1, 2, 4]}, teacher_steps=[]))
    rows = [(row.solver, row.steps, row.nfe) for row in found.rows if row.role == "student"]
    assert rows == [("accelerated", 1, 2), ("accelerated", 2, 3), ("accelerated", 4, 5)]
    assert all(row.rms < 2e-3 and row.straightness is None for row in found.rows if row.role == "student")


def test_fresh_noise_depends_on_seed_index_and_step_alone(flow_map_run, tmp_path, monkeypatch):
    """The same samples whatever the block, in an evaluation and by `distill sample`."""
    student = load_student(flow_map_run.student("renoise"), CPU)
    method = sampling.of_student(student, uniform_grid(3))
    whole, parts, shifted = (
        torch.cat([b.samples for b in sampling.blocks(method, student, seed=s, count=10, block=n, device=CPU)])
        for s, n in ((7, 10), (7, 4), (8, 10))
    )
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, shifted)
    first, second = sampling.fresh_noises(7, range(10), (2,), 2)
    for k, noises in enumerate((first, second)):
        for i in range(10):
            assert torch.equal(noises[i : i + 1], sample_noise(key(7, "renoise", k), [i], (2,)))
    noise = sample_noise(7, range(10), (2,))
    assert not torch.equal(first, second)
    assert not torch.equal(first, noise)
    torch.testing.assert_close(whole, renoise.sample(student.student, noise, uniform_grid(3), {}, first, second))
    for block in (10, 4):
        monkeypatch.setattr(sample, "BLOCK", block)
        out = tmp_path / f"{block}.safetensors"
        sample.write_samples(flow_map_run.student("renoise"), out, steps=3, seed=7, count=10, labels=None, device=CPU)
        found = load_file(out)
        torch.testing.assert_close(found["samples"], whole, atol=1e-6, rtol=0)
        assert torch.equal(found["fresh"], torch.stack([first, second]))


@pytest.mark.parametrize("sampler", ["jump", "renoise"])
def test_a_flow_maps_sample_is_what_plain_diffusers_makes(flow_map_run, tmp_path, sampler):
    from diffusers import DiffusionPipeline

    folder = flow_map_run.student(sampler)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for steps in (1, 2, 4):
        out = tmp_path / f"{steps}.safetensors"
        sample.write_samples(folder, out, steps=steps, seed=7, count=12, labels=None, device=CPU)
        found = load_file(out)
        theirs = pipeline(steps, latents=found["latents"], fresh=found.get("fresh"), output_type="pt").images
        assert (theirs - found["samples"]).abs().max() <= 1e-5


# --- images ---


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A run whose teach and student stages are untrained networks of digits."""
    run = RunPaths(tmp_path_factory.mktemp("images") / "r")
    for name, seed in (("teach", 0), ("student", 1)):
        export(
            VelocityStudent(build(UNetSpec(kind="unet", channels=[8]), (1, 8, 8), 10, seed)),
            run.student(name),
            card((1, 8, 8), 10),
        )
    spec = RunSpec.model_validate(
        {
            "name": "r",
            "data": {"kind": "digits"},
            "stages": {
                "evaluate": {
                    "kind": "evaluate", "teacher": "teach", "students": {"student": [1]}, "teacher_steps": [1],
                    "fine_steps": 2, "samples": 70, "block": 32,
                }
            },
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TRAIN_IMAGES", 8_000)
        return run, spec, go(run, spec)


def test_images_are_compared_by_named_features(image_run):
    run, _, found = image_run
    assert found.distance == "FD-digits"
    assert found.features.accuracy > 0.9
    assert found.reference == 1797
    for row in found.rows:
        assert row.distance > 100, "untrained networks make no digits"
        assert 0 <= row.precision <= 1
    assert (
        "FD-digits: Frechet distance to 1,797 real images, 64 features of a classifier trained on their classes"
        in results.describe(found)
    )


def test_pictures_show_the_first_samples_in_columns_of_classes(image_run):
    run, spec, found = image_run
    row = found.row("student", 1)
    sheet = np.asarray(Image.open(run.stage("evaluate").root / row.picture))[::6, ::6]  # 8 pixels are shown as 48
    assert sheet.shape == (6 * 9 - 1, 10 * 9 - 1)
    student = load_student(run.student("student"), CPU)
    noise = sample_noise(found.seed, range(32), (1, 8, 8))
    with torch.no_grad():
        method, cond = sampling.of_student(student, uniform_grid(1)), {"class_labels": sample_labels(range(32), 10)}
        images = method.generate(noise, cond, [])
    expected = ((images[13, 0] / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    np.testing.assert_allclose(sheet[9:17, 27:35].astype(float), expected, atol=1)  # sample 13: row 1, column 3


def test_table_has_a_line_for_every_row_and_says_what_was_measured(image_run):
    _, _, found = image_run
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(results.table(found))
    text = console.export_text()
    for word in ("NFE", "FD-digits", "KID", "precision", "recall", "RMS to teacher", "images/s", "teacher, heun"):
        assert word in text
    assert "70 samples per row" in text
    assert results.cells(found, found.rows[0])[2] == f"{1000 * found.rows[0].kid:.2f}"
    numbers = [results.number(value) for value in (1481.3, 10.123, 0.98765, 0.00001234, 0.0)]
    assert numbers == ["1,481", "10.12", "0.9877", "1.2e-05", "0.0000"]


def test_what_does_not_fit_is_refused(image_run, vector_run):
    run, spec, _ = image_run
    other = RunSpec.model_validate({**spec.model_dump(), "data": {"kind": "none"}})
    found = go(RunPaths(run.root), other)
    assert found.distance is None
    assert found.rows[0].distance is None
    assert results.columns(found) == ["NFE", "RMS to teacher", "best baseline", "images/s"]
    stage = spec.stages["evaluate"]
    teacher = load_teacher(CheckpointTeacher(path=str(run.student("teach"))), CPU)
    others = {"vectors": load_student(vector_run.student("exact"), CPU)}
    with (
        Progress("x", 1, "samples", None) as progress,
        pytest.raises(
            InputError,
            match=r"student vectors makes samples of shape \[2\] with no classes, but the teacher \[1, 8, 8\] with",
        ),
    ):
        measuring.measure(
            run.root,
            "x",
            stage,
            teacher,
            others,
            None,
            seed=0,
            device=CPU,
            progress=progress,
            stop=StopRequest(),
            store=run.root.parent,
        )
    mnist_like = ArrayData("big", torch.zeros(4, 1, 28, 28), None, None)
    with (
        Progress("x", 1, "samples", None) as progress,
        pytest.raises(InputError, match=r"data 'big' has samples of shape \[1, 28, 28\].* makes \[1, 8, 8\]"),
    ):
        measuring.measure(
            run.root,
            "x",
            stage,
            teacher,
            {},
            mnist_like,
            seed=0,
            device=CPU,
            progress=progress,
            stop=StopRequest(),
            store=run.root.parent,
        )
    few = ArrayData("few", torch.zeros(3, 1, 8, 8), None, None)
    with (
        Progress("x", 1, "samples", None) as progress,
        pytest.raises(InputError, match="data 'few' has 3 images, but an evaluation needs at least 4, since"),
    ):
        measuring.measure(
            run.root,
            "x",
            stage,
            teacher,
            {},
            few,
            seed=0,
            device=CPU,
            progress=progress,
            stop=StopRequest(),
            store=run.root.parent,
        )
    with pytest.raises(InputError, match="no row for student at 3 steps"):
        found.row("student", 3)


def test_results_go_into_a_folder(vector_run):
    vector_run.stage("evaluate").root.mkdir(parents=True)
    (vector_run.stage("evaluate").root / "rows").write_text("")
    with pytest.raises(InputError, match="results cannot be written to .*evaluate: File exists; name another folder"):
        go(vector_run, vector_spec())


def test_evaluation_without_a_teacher_is_refused(vector_run):
    spec = RunSpec.model_validate({"name": "r", "stages": {"evaluate": {"kind": "evaluate", "students": {}}}})
    with pytest.raises(InputError, match=r"stages.evaluate.teacher is not given and the spec has no teacher"):
        go(vector_run, spec)


# --- distill sample ---


def test_sample_is_what_plain_diffusers_makes(image_run, tmp_path):
    from diffusers import DiffusionPipeline

    run, _, _ = image_run
    folder = run.student("student")
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for steps in (1, 2, 4):
        out = tmp_path / f"{steps}.safetensors"
        sample.write_samples(folder, out, steps=steps, seed=7, count=12, labels=None, device=CPU)
        found = load_file(out)
        theirs = pipeline(steps, found["class_labels"], latents=found["latents"], output_type="pt").images
        assert (theirs - found["samples"]).abs().max() <= 1e-5
    sample.write_samples(folder, tmp_path / "g.png", steps=1, seed=7, count=20, labels=None, device=CPU)
    assert Image.open(tmp_path / "g.png").size == (6 * (10 * 9 - 1), 6 * (2 * 9 - 1))
    sample.write_samples(folder, tmp_path / "c.safetensors", steps=1, seed=7, count=3, labels=[4], device=CPU)
    assert load_file(tmp_path / "c.safetensors")["class_labels"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("out", "labels", "message"),
    [
        ("grid.jpg", None, r"the name must end in .png \(a picture\) or .safetensors"),
        ("nowhere/grid.png", None, "nowhere is not a folder; create it first"),
        ("grid.png", [10], "class 10 does not exist; this student knows 0 to 9"),
        ("grid.png", [1, 2], "2 classes for 3 samples; give one class, or one for each sample"),
    ],
)
def test_sample_refuses_what_cannot_work(image_run, tmp_path, out, labels, message):
    with pytest.raises(InputError, match=message):
        sample.write_samples(
            image_run[0].student("student"), tmp_path / out, steps=1, seed=0, count=3, labels=labels, device=CPU
        )
    assert list(tmp_path.iterdir()) == []


def test_samples_are_made_in_blocks(image_run, tmp_path, monkeypatch):
    folder, found = image_run[0].student("student"), {}
    for block in (12, 5):
        monkeypatch.setattr(sample, "BLOCK", block)
        sample.write_samples(folder, tmp_path / "s.safetensors", steps=2, seed=7, count=12, labels=None, device=CPU)
        found[block] = load_file(tmp_path / "s.safetensors")
    assert torch.equal(found[12]["latents"], found[5]["latents"])
    torch.testing.assert_close(found[12]["samples"], found[5]["samples"], atol=1e-5, rtol=0)


def test_sample_of_vectors(vector_run, tmp_path):
    folder = vector_run.student("exact")
    sample.write_samples(folder, tmp_path / "v.png", steps=1, seed=0, count=50, labels=None, device=CPU)
    assert Image.open(tmp_path / "v.png").size == (720, 720)
    sample.write_samples(folder, tmp_path / "v.safetensors", steps=1, seed=0, count=50, labels=None, device=CPU)
    found = load_file(tmp_path / "v.safetensors")
    torch.testing.assert_close(found["samples"], torch.tensor(MEAN) + STD * found["latents"], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="--classes was given, but this student is unconditional"):
        sample.write_samples(folder, tmp_path / "v.png", steps=1, seed=0, count=2, labels=[0], device=CPU)


# --- pictures ---


def test_grid_places_images_row_by_row_clamped():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0])[:, None, None, None].expand(5, 1, 3, 2)
    magnified = np.asarray(Image.open(io.BytesIO(images_png(images, 3))))
    assert magnified.shape == (7 * 16, 8 * 16), "3 pixels become 48"
    sheet = magnified[::16, ::16]
    assert (sheet.repeat(16, 0).repeat(16, 1) == magnified).all(), "and nothing is smoothed"
    assert [sheet[0, 0], sheet[0, 3], sheet[0, 6], sheet[4, 0], sheet[4, 3]] == [0, 0, 128, 255, 255]
    assert (sheet[3] == 255).all(), "a white gap"
    colour = torch.zeros(1, 3, 2, 2)
    colour[0, 0] = 1
    assert Image.open(io.BytesIO(images_png(colour, 1))).getpixel((0, 0)) == (255, 128, 128)
    with pytest.raises(ValueError, match="images have 4 channels"):
        images_png(torch.zeros(1, 4, 2, 2), 1)
    assert images_png(images, 3) == images_png(images, 3)
    assert (columns_for(60, 10), columns_for(60, None), columns_for(9, 1000), columns_for(1, None)) == (10, 8, 3, 1)


def test_scatter_of_one_dimension_and_several():
    for dim in (1, 5):
        png = scatter_png(torch.randn(40, dim), torch.randn(40, dim))
        assert Image.open(io.BytesIO(png)).size == (720, 720)
        assert scatter_png(torch.zeros(4, dim), None) == scatter_png(torch.zeros(4, dim), None)


def test_rows_on_disk_are_plain_json(image_run):
    run, _, found = image_run
    row = json.loads((run.stage("evaluate").root / "rows" / "student-student-euler-1.json").read_text())
    assert row["row"]["network"] == "student"
