"""Solvers of the teacher's ODE by number of network calls: errors on a mixture, and on the digits preset's teacher."""

import subprocess
import sys
import tempfile
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

CALLS = (4, 6, 8, 10, 16, 20)
SAMPLES = 96
MIXTURE = [-1.0, 1.2], [0.3, 0.4], [0.4, 0.6]  # means, standard deviations, weights
REFERENCE = ("heun", 200)  # of the digits teacher


def mixture() -> tuple[VelocityField, torch.Tensor, Cond, torch.Tensor]:
    """A mixture of two normals, quantiles as noise, and the exact samples."""
    means, stds, weights = (torch.tensor(values, dtype=torch.float64) for values in MIXTURE)
    return MixtureField(means[:, None], stds, weights), *quantiles(0.5)


def quantiles(offset: float) -> tuple[torch.Tensor, Cond, torch.Tensor]:
    """The quantiles (i + offset) / 512 as noise, no condition, and the exact samples of the mixture."""
    noise = torch.special.ndtri((torch.arange(512, dtype=torch.float64) + offset) / 512)[:, None]
    one, exact = torch.ones(512, dtype=torch.float64), QuantileFlowMap(*map(torch.tensor, MIXTURE))
    return noise, {}, exact.jump(noise, one, 0 * one)


def digits(teacher: Path) -> tuple[VelocityField, torch.Tensor, Cond, torch.Tensor]:
    """The teacher in this folder, noise, classes, and the samples of many Heun steps."""
    loaded = load_teacher(CheckpointTeacher(path=str(teacher)), torch.device("cpu"))
    noise = sample_noise(0, range(SAMPLES), loaded.shape)
    cond = {"class_labels": sample_labels(range(SAMPLES), 10)}
    name, steps = REFERENCE
    return loaded.field, noise, cond, solve(loaded.field, noise, cond, solver=name, steps=steps)


def trained(folder: Path) -> Path:
    """The folder of the preset's teacher, trained in a run below `folder` (about two minutes)."""
    teach, _, _ = (presets.folder() / "digits.yaml").read_text().partition("  pairs:\n")
    (folder / "teach.yaml").write_text(teach)
    command = [sys.executable, "-m", "distill", "run", "teach.yaml", "--store", "runs"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "runs" / "digits" / "students" / "teach"


def errors(field: VelocityField, noise: torch.Tensor, cond: Cond, truth: torch.Tensor) -> dict[str, dict[int, float]]:
    """Solver -> number of network calls, at most those of CALLS -> RMS error of the samples."""
    found: dict[str, dict[int, float]] = {}
    for name in kinds.ode_solvers():
        for calls in CALLS:
            steps = max(n for n in range(1, calls + 1) if find_solver(name).calls(n) <= calls)
            samples = solve(field, noise, cond, solver=name, steps=steps)
            found.setdefault(name, {})[calls] = (samples - truth).double().square().mean().sqrt().item()
    return found


def table(title: str, found: dict[str, dict[int, float]]) -> list[str]:
    rows = [f"{name:18s}" + "".join(f"{error:8.4f}" for error in each.values()) for name, each in found.items()]
    return [f"{title:18s}" + "".join(f"{calls:8d}" for calls in CALLS), *rows]


def bench_solvers() -> str:
    """RMS error of each solver by network calls; trains the digits teacher first."""
    with tempfile.TemporaryDirectory() as folder:
        of_digits = errors(*digits(trained(Path(folder))))
    ratio = of_digits["ab3"][8] / of_digits["dpm_solver_pp_2m"][8]
    lines = [*table("mixture, calls:", errors(*mixture())), *table("digits, calls:", of_digits)]
    return "\n    ".join([f"solvers ab3 / dpm_solver_pp_2m at 8 calls on digits: {ratio:.2f} (goal <= 0.75)", *lines])
