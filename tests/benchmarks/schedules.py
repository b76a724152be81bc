"""Step times by criterion: errors of solvers on a mixture and on the digits teacher, along the times of each."""

import tempfile
from pathlib import Path

import torch

from distill.flow.draws import sample_noise
from distill.flow.solvers import solve_along
from distill.protocols import Cond, VelocityField
from distill.students import ays, step_times
from tests.benchmarks.solvers import digits, mixture, trained

STEPS, SOLVERS = (4, 8), ("euler", "ab2", "dpm_solver_pp_2m")


def times(measured: tuple[list[float], torch.Tensor], steps: int) -> list[float]:
    """The step times with the least total cost."""
    t_grid, costs = measured
    return [t_grid[i] for i in step_times.least(costs, steps)]


def bench(
    title: str, field: VelocityField, noise: torch.Tensor, cond: Cond, truth: torch.Tensor, other: torch.Tensor
) -> list[str]:
    """A table. other: noise on which the errors of steps are measured."""
    of_ays = {
        f"ays, {fine}": ays.measure(field, truth, cond, seed=0, indices=range(len(truth)), fine=fine)
        for fine in (100, 15)
    }
    lines = [f"{title:22s}{'uniform':>10s}{'error':>10s}" + "".join(f"{name:>10s}" for name in of_ays)]
    for solver in SOLVERS:
        of_error = step_times.measure(field, other, cond, solver=solver, fine=100)
        for steps in STEPS:
            grids = [[1 - i / steps for i in range(steps + 1)]]
            grids += [times(measured, steps) for measured in (of_error, *of_ays.values())]
            samples = [solve_along(field, noise, cond, solver=solver, times=grid) for grid in grids]
            errors = [(each - truth).double().square().mean().sqrt().item() for each in samples]
            lines.append(f"{solver:18s}{steps:4d}" + "".join(f"{error:10.4f}" for error in errors))
    for steps in STEPS:
        chosen = (f"{name}: {', '.join(f'{t:.3g}' for t in times(each, steps))}" for name, each in of_ays.items())
        lines.append(f"times of {'; '.join(chosen)}")
    return lines


def bench_schedules() -> str:
    """RMS errors of 4 and 8 steps along uniform times and those of each criterion; trains the digits teacher first."""
    field, noise, cond, truth = mixture()
    lines = bench("mixture", field, noise, cond, truth, noise)
    with tempfile.TemporaryDirectory() as folder:
        field, noise, cond, truth = digits(trained(Path(folder)))
        lines += bench("digits", field, noise, cond, truth, sample_noise(1, range(len(noise)), tuple(noise.shape[1:])))
    return "\n    ".join(["schedules, RMS error by the criterion of the step times:", *lines])
