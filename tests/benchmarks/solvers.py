"""Methods that solve the teacher's ODE, by number of network calls: errors on a mixture, and on the digits teacher.

Beside the solvers of distill, these are the methods of `others.py`, which are not part of it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from distill.flow.draws import sample_labels, sample_noise
from distill.flow.solvers import solve
from distill.protocols import Cond, VelocityField
from distill.solvers import find_solver
from distill.spec import kinds, presets
from distill.spec.model import CheckpointTeacher
from distill.teachers import load_teacher
from distill.teachers.analytic import MixtureField
from distill.testing.closed_form import QuantileFlowMap

from .fitted import paths
from .others import CALLS, Errors, other_errors, rms, shortened_errors

SAMPLES = 96
FITTED_TO = range(1000, 1064)  # the samples to which methods are fitted
REFERENCE = ("heun", 200)  # of the digits teacher


def mixture(offset: float = 0.5) -> tuple[VelocityField, torch.Tensor, Cond, torch.Tensor]:
    """A mixture of two normals, quantiles (i + offset)/512 as noise, and the exact samples."""
    means, stds, weights = [-1.0, 1.2], [0.3, 0.4], [0.4, 0.6]
    field = MixtureField(torch.tensor(means, dtype=torch.float64)[:, None], torch.tensor(stds), torch.tensor(weights))
    noise = torch.special.ndtri((torch.arange(512, dtype=torch.float64) + offset) / 512)[:, None]
    one, exact = torch.ones(512, dtype=torch.float64), QuantileFlowMap(*map(torch.tensor, (means, stds, weights)))
    return field, noise, {}, exact.jump(noise, one, 0 * one)


def digits(teacher: Path) -> tuple[VelocityField, torch.Tensor, Cond, torch.Tensor]:
    """The teacher in this folder, noise, classes, and the samples of many Heun steps."""
    field, noise, cond = drawn(teacher, range(SAMPLES))
    name, steps = REFERENCE
    return field, noise, cond, solve(field, noise, cond, solver=name, steps=steps)


def drawn(teacher: Path, indices: range) -> tuple[VelocityField, torch.Tensor, Cond]:
    """The teacher in this folder, and the noise and classes of these samples."""
    loaded = load_teacher(CheckpointTeacher(path=str(teacher)), torch.device("cpu"))
    cond = {"class_labels": sample_labels(indices, 10)}
    return loaded.field, sample_noise(0, indices, loaded.shape), cond


def trained(folder: Path) -> Path:
    """The folder of the preset's teacher, trained in a run below `folder` (about two minutes)."""
    teach, _, _ = (presets.folder() / "digits.yaml").read_text().partition("  pairs:\n")
    (folder / "teach.yaml").write_text(teach)
    command = [sys.executable, "-m", "distill", "run", "teach.yaml", "--store", "runs"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "runs" / "digits" / "students" / "teach"


def errors(field: VelocityField, noise: torch.Tensor, cond: Cond, truth: torch.Tensor) -> Errors:
    """Of the solvers of distill, each with at most the given number of calls."""
    found: Errors = {}
    for name in kinds.ode_solvers():
        for calls in CALLS:
            steps = max(n for n in range(1, calls + 1) if find_solver(name).calls(n) <= calls)
            samples = solve(field, noise, cond, solver=name, steps=steps)
            found.setdefault(name, {})[calls] = rms(samples - truth)
    return found


def table(title: str, found: Errors) -> list[str]:
    """A line for each method; "-" where it was not measured."""

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:26s}" + "".join(f"{cell:>8s}" for cell in cells)

    rows = [line(name, (f"{each[n]:.4f}" if n in each else "-" for n in CALLS)) for name, each in found.items()]
    return [line(title, map(str, CALLS)), *rows]


def on_mixture() -> Errors:
    problem, (field, noise, cond, _) = mixture(), mixture(0.25)
    return errors(*problem) | other_errors(*problem, paths(field, noise, cond))


def on_digits(teacher: Path) -> Errors:
    problem = digits(teacher)
    return errors(*problem) | other_errors(*problem, paths(*drawn(teacher, FITTED_TO))) | shortened_errors(*problem)


def bench_solvers() -> str:
    """RMS error of each method by network calls; trains the digits teacher first."""
    with tempfile.TemporaryDirectory() as folder:
        of_digits = on_digits(trained(Path(folder)))
    ratio = of_digits["ab3"][8] / of_digits["dpm_solver_pp_2m"][8]
    lines = [*table("mixture, calls:", on_mixture()), *table("digits, calls:", of_digits)]
    return "\n    ".join([f"solvers ab3 / dpm_solver_pp_2m at 8 calls on digits: {ratio:.2f} (goal <= 0.75)", *lines])
