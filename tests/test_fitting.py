"""Fitted solvers (BNS): the known answer of a Gaussian, the solvers that they contain, the store, and students."""

import json
import math

import pytest
import torch
from benchmarks import solvers as bench
from commands import command
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from distill.core.errors import InputError, RunError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.flow.draws import sample_noise
from distill.flow.solvers import integrate
from distill.flow.times import uniform_grid
from distill.networks.architectures import build
from distill.networks.velocity import VelocityStudent
from distill.spec.model import CheckpointTeacher, GaussianTeacher, MlpSpec
from distill.students import fitted, fitting
from distill.students.exporting import export
from distill.students.samplers import bns
from distill.teachers import LoadedTeacher, load_teacher

CPU = torch.device("cpu")
MEAN, STD = [0.5, -0.2], math.sqrt(0.3)
GAUSSIAN = GaussianTeacher(kind="gaussian", mean=MEAN, std=[STD, STD])
TEACHER = GAUSSIAN.model_dump_json()
UNEVEN = torch.tensor([1.0, 0.8, 0.35, 0.2, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("t_grid", [uniform_grid(4), UNEVEN], ids=["uniform", "uneven"])
@pytest.mark.parametrize("solver", ["euler", "ab2", "ab3"])
def test_a_fitted_solver_can_be_any_solver_with_one_call_per_step(solver, t_grid):
    field, noise, cond, _ = bench.mixture()
    rows = fitting.rows_of(solver, t_grid, field.t_range)
    assert rows.shape == (4, 5) and (rows[0, 2:] == 0).all()
    same = bns.sample(field, noise, t_grid, cond, rows)
    assert torch.allclose(same, integrate(solver, field, noise, t_grid, cond), atol=1e-12, rtol=0)


def test_one_step_is_exact_on_a_gaussian():
    """At t = 1 the velocity is noise - mean, so data = mean + std noise = (1 + std) noise - velocity."""
    teacher = load_teacher(GAUSSIAN, CPU)
    found = fitting.fit(teacher, 1, device=CPU, samples=64)
    assert found.rows[0] == pytest.approx([1 + STD, -1.0], abs=2e-4) and found.times == [1.0, 0.0]
    noise = sample_noise(3, range(50), (2,)).double()
    made = fitted.method(teacher, found).generate(noise, {}, [])
    assert torch.allclose(made, torch.tensor(MEAN) + STD * noise, atol=1e-3)
    assert found.rms < 1e-3 < 0.4 < found.rms_before  # Euler's one step ends at the mean


def on_quantiles(steps: int) -> list[float]:
    """RMS errors on quantiles of the mixture that are not fitted: of ab2, of least squares, and after the fit."""
    field, noise, cond, exact = bench.mixture()
    _, others, _, truth = bench.mixture(0.25)
    pairs, held_out = (
        fitting.SolvedPaths(cond, torch.stack([*bench.paths(field, x, cond).states[: -1 : 240 // steps], end]))
        for x, end in ((noise, exact), (others, truth))
    )
    numbers = fitting.FittedNumbers(steps, field, CPU)
    kept = fitting.minimize(field, pairs, held_out, numbers, lambda done, total: None)
    return [kept[0].rms, kept[1].rms, kept[-1].rms]


def test_least_squares_along_the_path():
    """Measured: with two steps, ab2 .2641, least squares .1826; with four, .0903 and .0394."""
    field, noise, cond, _ = bench.mixture()
    _, others, _, truth = bench.mixture(0.25)
    for steps, expected in ((2, 0.1826), (4, 0.0394)):
        paths = fitting.SolvedPaths(cond, bench.paths(field, noise, cond).states[:: 240 // steps])
        rows = fitting.least_squares(field, paths, uniform_grid(steps).tolist())
        found = (bns.sample(field, others, uniform_grid(steps), cond, rows) - truth).square().mean().sqrt().item()
        assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.long
def test_two_steps_on_the_mixture():
    """Measured: ab2 .2641, least squares .1826, fitted .0759."""
    ab2, least_squares, after = on_quantiles(2)
    assert ab2 == pytest.approx(0.2641, abs=1e-4) and least_squares == pytest.approx(0.1826, abs=1e-3) and after < 0.08


@pytest.mark.long
def test_four_steps_on_the_mixture():
    """The bar is .01; measured: ab2 .0903, least squares .0394, fitted .0037."""
    ab2, least_squares, after = on_quantiles(4)
    assert ab2 == pytest.approx(0.0903, abs=1e-4) and least_squares == pytest.approx(0.0394, abs=1e-3) and after < 0.005


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    network = build(MlpSpec(kind="mlp", width=8, depth=1), (2,), 3, seed=0)
    facts = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="0" * 64, teacher_digest=None, num_classes=3, null_class=3,
        shape=(2,), weights="raw", images=1, license="mit",
    )  # fmt: skip
    export(VelocityStudent(network), tmp_path / "teacher", facts)
    return tmp_path


def test_it_is_fitted_once_and_kept(capfd, here, monkeypatch):
    asked = ["schedule", TEACHER, "--steps", "1", "--fit", "--samples", "64"]
    first = command(capfd, *asked)
    assert first.code == 0, first.err
    title, times, errors = first.out.splitlines()
    assert title == "solver of 1 step, fitted to the Gaussian teacher in 2 dimensions on 64 paths"
    assert times == "times: 1, 0" and errors.endswith(" with ab2")
    teacher = load_teacher(GAUSSIAN, CPU)
    file = fitted.path(here / "runs", teacher.digest, 1, 1.0)
    before = file.read_bytes()
    again = command(capfd, *asked[:-1], "65")
    assert again.code == 0 and file.read_bytes() != before, "other settings replace it"
    command(capfd, *asked)
    assert file.read_bytes() == before, "the same settings give the same numbers"
    monkeypatch.setattr(fitting, "fit", None)
    assert command(capfd, *asked).out == first.out
    assert json.loads(command(capfd, *asked, "--json").out)["rows"][0] == pytest.approx([1 + STD, -1.0], abs=2e-4)
    file.write_text(before.decode().replace('"steps": 1', '"steps": 2'))
    damaged = command(capfd, *asked)
    assert damaged.code == 2 and "cannot be used" in damaged.err and "delete it" in damaged.err


@pytest.mark.long
def test_a_student_of_it_has_the_weights_of_the_teacher(capfd, here):
    asked = ["schedule", "teacher", "--steps", "2", "--fit", "--samples", "48", "--out", "student"]
    done = command(capfd, *asked)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "wrote student: a student with this solver"
    own, theirs = (
        load_file(here / each / "unet/diffusion_pytorch_model.safetensors") for each in ("student", "teacher")
    )
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    card = student_card.read(here / "student")
    teacher = load_teacher(CheckpointTeacher(path=str(here / "teacher")), CPU)
    found = fitted.load(here / "runs", teacher.digest, 2)
    assert (card.sampler, card.images, card.license, card.teacher_digest) == ("bns", 0, "mit", teacher.digest)
    assert card.metrics == {"rms@2": float(f"{found.rms:.6g}")} and list(card.t_grids) == [2]
    assert "the weights are the teacher's" in (here / "student" / "README.md").read_text()
    noise, labels = sample_noise(5, range(6), (2,)), torch.tensor([0, 1, 2] * 2)
    made = fitted.method(teacher, found).generate(noise, {"class_labels": labels}, [])
    pipeline = DiffusionPipeline.from_pretrained(here / "student", trust_remote_code=True)
    assert torch.allclose(pipeline(2, class_labels=labels, latents=noise, output_type="pt").images, made, atol=1e-6)
    sampled = command(capfd, "sample", "student", "--out", "s.safetensors", "--count", "6")
    assert sampled.code == 0, sampled.err
    kept = load_file(here / "s.safetensors")
    same = fitted.method(teacher, found).generate(kept["latents"], {"class_labels": kept["class_labels"]}, [])
    assert torch.allclose(kept["samples"], same, atol=1e-6)
    asked = ["sample", "teacher", "--out", "t.safetensors", "--count", "6", "--schedule", "bns", "--steps"]
    assert command(capfd, *asked, "2").code == 0
    assert torch.equal(load_file(here / "t.safetensors")["samples"], kept["samples"])
    missing = command(capfd, *asked, "3")
    assert missing.code == 2 and "no solver of 3 steps was fitted to this student yet; use:" in missing.err
    refused = command(capfd, "sample", "student", "--out", "s.safetensors", "--steps", "3")
    assert refused.code == 2 and "supports only 2 steps, not 3" in refused.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "2", "--out", "s"], "--out: has no effect without --fit"),
        (["--steps", "2", "--fit", "--solver", "heun"], "--solver, --fine and --criterion have no effect with --fit"),
        (["--steps", "65", "--fit"], "--steps 65: a solver can be fitted for 1 to 64 steps"),
        (["--steps", "2", "--fit", "--out", "s"], "the Gaussian teacher in 2 dimensions has no network to export"),
        (["--steps", "2", "--fit", "--out", "s", "--guidance-scale", "2"], "guidance takes two calls"),
    ],
)
def test_what_has_no_effect_is_refused(capfd, here, given, said):
    refused = command(capfd, "schedule", TEACHER, *given)
    assert refused.code == 2 and said in refused.err and refused.err.count("\n") == 1
    assert not (here / "runs").exists() and not (here / "s").exists()


def test_the_first_call_is_at_the_noisiest_time_and_none_below_the_lowest():
    """A field between .02 and .9: the solver starts at .9 and jumps from a time of at least .02 to data."""
    field, noise, cond, exact = bench.mixture()
    called = []

    class Narrow:
        interpolant, t_range = field.interpolant, (0.02, 0.9)

        def __call__(self, x_t, t, cond):
            called.append(t[0].item())
            return field(x_t, t, cond)

    numbers = fitting.FittedNumbers(3, Narrow(), CPU)
    numbers.lengths.data = torch.tensor([3.0, 2.0, -30.0], dtype=torch.float64)
    numbers.end(Narrow(), noise, cond)
    assert called[0] == 0.9 and min(called) >= 0.02 and numbers.times[-1] == 0


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 steps has 3 rows, of 2 to 4 weights"):
        student_card.refuse_rows([[1.0, 0.5], [1.0, 0.5]], 3)
    with pytest.raises(ValueError, match="must be finite"):
        student_card.refuse_rows([[1.0, math.nan]], 1)
    teacher = load_teacher(GAUSSIAN, CPU)
    with pytest.raises(InputError, match="has no network to export"):
        fitted.refuse_student(teacher, 1.0)


def test_a_fit_is_replaced_only_on_request(tmp_path):
    """Pairs and evaluations take what the store has, whatever it was fitted to."""
    teacher = load_teacher(GAUSSIAN, CPU)
    first = fitting.find(teacher, tmp_path, 1, device=CPU, samples=64, seed=5)
    assert fitting.find(teacher, tmp_path, 1, device=CPU) == first
    assert fitting.find(teacher, tmp_path, 1, device=CPU, samples=48) != first
    assert fitted.load(tmp_path, teacher.digest, 1).samples == 48


def test_a_teacher_that_makes_no_numbers_is_named(tmp_path):
    network = build(MlpSpec(kind="mlp", width=8, depth=1), (2,), None, seed=0)
    next(network.parameters()).data.fill_(float("nan"))
    field = VelocityStudent(network)
    teacher = LoadedTeacher(field, (2,), None, None, "d" * 64, "a broken teacher", network)
    with pytest.raises(RunError, match="the samples of a broken teacher contain NaN or infinity; no solver was fitted"):
        fitting.find(teacher, tmp_path, 1, device=CPU, samples=64)
    assert not list(tmp_path.rglob("*.json"))
