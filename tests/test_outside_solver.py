"""A solver of an installed external package: used by its name, without changes in distill/, or refused clearly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import command
from runs import distill

from distill.core.errors import InputError
from distill.flow import solvers
from distill.flow.draws import sample_noise
from distill.flow.fields import Counted
from distill.flow.interpolants import edm
from distill.solvers import find_solver, solver_names
from distill.spec import kinds, presets, specfile
from distill.spec.model import EvaluateStage
from distill.students import step_times
from distill.teachers.analytic import GaussianField
from distill.testing.closed_form import GaussianFlowMap

HERE = Path(__file__).parent
MEAN, STD = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)
FIELD = GaussianField(MEAN, STD)
SPEC = {
    "name": "outside",
    "teacher": {"kind": "gaussian", "mean": MEAN.tolist(), "std": STD.tolist()},
    "stages": {"pairs": {"kind": "pairs", "count": 256, "shard": 256, "solver": "midpoint", "steps": 16}},
}
OURS, ODE_SOLVERS = solver_names(), kinds.ode_solvers()
PARTS = (HERE / "outside" / "outside_midpoint.py").read_text()


def install(site: Path, package: str, group: str = "distill.solvers", **plugins: str) -> None:
    """What pip leaves of a package with these plug-ins, name=module."""
    info = site / f"{package}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    points = [f"{name} = {module}" for name, module in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *points, ""]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


@pytest.fixture
def midpoint(site):
    install(site, "outside-recipes", midpoint="outside_midpoint")
    shutil.copy(HERE / "outside" / "outside_midpoint.py", site)


def test_its_order_and_its_calls_are_those_it_declares(midpoint):
    noise, solver = sample_noise(0, range(32), (2,)).double(), find_solver("midpoint")
    field = GaussianField(MEAN, STD, edm())  # on the linear path of a Gaussian the rule happens to be of order 3
    t, s = (torch.full((32,), time, dtype=torch.float64) for time in (0.9, 0.05))
    truth = noise - 0.85 * GaussianFlowMap(MEAN, STD, edm())(noise, t, s, {})
    errors = []
    for steps in (64, 128):
        counted = Counted(field)
        grid = torch.linspace(0.9, 0.05, steps + 1, dtype=torch.float64)
        end = solvers.integrate("midpoint", counted, noise, grid, {})
        assert counted.calls == solver.calls(steps) == 2 * steps
        errors.append((end - truth).square().mean().sqrt())
    assert (errors[0] / errors[1]).log2() == pytest.approx(solver.order, abs=0.12)
    data = MEAN + STD * noise
    assert (solvers.invert(FIELD, data, {}, solver="midpoint", steps=128, noise=noise) - noise).abs().max() < 1e-3
    below = Counted(GaussianField(MEAN, STD, t_range=(0.1, 1.0)))
    solvers.solve(below, noise, {}, solver="midpoint", steps=16)
    assert below.calls == 32


def test_optimal_step_times_are_found_for_it(midpoint):
    noise = sample_noise(0, range(8), (2,)).double()
    times, costs = step_times.measure(FIELD, noise, {}, solver="midpoint", fine=8)
    euler = step_times.measure(FIELD, noise, {}, solver="euler", fine=8)[1]
    assert len(times) == 9 and costs[0, 4] < euler[0, 4]


def test_it_is_named_where_solvers_are(tmp_path, midpoint):
    assert solver_names() == [*OURS, "midpoint"]
    assert kinds.inverting_solvers() == ["euler", "heun", "ab2", "ab3", "midpoint"]
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    spec = specfile.load(path).spec
    assert spec.stages["pairs"].network_calls == 32
    shown = presets.annotated(spec, tmp_path)
    words = " ".join(shown.replace("#", " ").split())
    assert (
        f"see `distill schedule --fit`; one of {', '.join(ODE_SOLVERS)}, midpoint, auto, bns solver: midpoint" in words
    )
    path.write_text(yaml.safe_dump(SPEC).replace("midpoint", "midpiont"))
    with pytest.raises(InputError, match="must be 'euler', 'heun', 'ab2', .*, 'midpoint', 'auto' or 'bns'"):
        specfile.load(path)


def test_a_run_solves_its_pairs_by_it(capfd, tmp_path, midpoint):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    done = command(capfd, "pairs", str(tmp_path / "spec.yaml"), "--store", str(tmp_path / "store"))
    assert done.code == 0, done.err
    (path,) = (tmp_path / "store").rglob("manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["solver"] == "midpoint" and manifest["nfe"] == 32


@pytest.mark.process
def test_the_control_plane_knows_it_without_torch(tmp_path, midpoint):
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(HERE.parent)])}
    helped = distill("pairs", "--help", cwd=tmp_path, env=env, fresh=True).stdout
    assert "unipc3, midpoint, auto or bns" in " ".join(helped.replace("│", " ").split())
    torchless = "import sys; from distill.solvers import *; find_solver('midpoint'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", torchless], env={**os.environ, **env}, check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PARTS.replace("def step", "def move"), r" \(.*outside_wrong.py\): step is missing; fix or uninstall"),
        (PARTS.replace("ORDER = 2", "ORDER = 'two'"), "ORDER: Input should be a valid integer; fix or uninstall"),
        (
            PARTS.replace("v: Tensor, at: Step", "v: Tensor, t: float, at: Step"),
            r"step must take \(ode, x, seen, at\); fix",
        ),
        (
            PARTS + "\n\ndef noises(steps: int) -> int:\n    return steps\n",
            "a solver with noises must set IS_REFERENCE = False and calls_inverting = None; fix",
        ),
        ("raise ValueError('no')", "line 1: ValueError: no"),
        ("import no_such_package", "needs the package no_such_package"),
        (None, "its module outside_package.wrong is not installed"),
    ],
    ids=[
        "a part is missing",
        "a part is of another type",
        "other arguments",
        "noises in a reference",
        "raises",
        "needs more",
        "not there",
    ],
)
def test_one_that_lacks_something_is_refused_where_it_is_used(site, text, message):
    install(site, "outside-solvers", wrong="outside_wrong" if text else "outside_package.wrong")
    if text:
        (site / "outside_wrong.py").write_text(text)
    with pytest.raises(InputError, match=f"^solver 'wrong' of the package outside-solvers.*{message}"):
        find_solver("wrong")
    evaluation = {"kind": "evaluate", "students": {}, "fine_solver": "heun"}  # nobody else is disturbed
    assert EvaluateStage.model_validate(evaluation).fine_solver == "heun"


def test_a_name_that_exists_is_refused(site, midpoint):
    install(site, "late", heun="outside_midpoint", midpoint="outside_midpoint")
    assert solver_names() == [*OURS, "midpoint"]
    with pytest.raises(
        InputError, match="^solver 'heun' of the package late: distill has a solver with this name; rename yours"
    ):
        find_solver("heun")
    with pytest.raises(InputError, match="^solver 'midpoint' of the package (late|outside-recipes): the package"):
        find_solver("midpoint")
