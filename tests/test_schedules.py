"""Step times of least summed error: against all choices there are, on paths whose costs are known."""

import itertools
import math

import pytest
import torch

from distill import schedules, solvers
from distill.draws import generator
from distill.fields import Counted
from distill.interpolants import linear
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.times import uniform_grid

STD = math.sqrt(0.3)
UNIT = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # mean 0, mean square 1
SOLVERS = ["euler", "heun", "dpm_solver_pp_2m"]


def gaussian(mean: float = 0.0, std: float = STD) -> GaussianField:
    return GaussianField(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))


def costs(solver: str = "euler", fine: int = 12, field=None, noise=UNIT) -> torch.Tensor:
    return schedules.measure(field or gaussian(), noise, {}, solver=solver, fine=fine)[1]


def summed(matrix: torch.Tensor, indices) -> float:
    return sum(matrix[i, j].item() for i, j in itertools.pairwise(indices))


def every(fine: int, steps: int):
    """All ways to go from 0 to fine in so many steps."""
    return [[0, *inner, fine] for inner in itertools.combinations(range(1, fine), steps - 1)]


def test_the_known_answer():  # T17
    matrix = costs()
    indices = schedules.least(matrix, 3)
    assert indices == [0, 6, 9, 12]
    assert summed(matrix, indices) == pytest.approx(0.0074214, abs=5e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_least_is_that_of_all_choices_and_falls_with_every_step(solver):  # T17
    fine = 9
    noise = torch.randn(5, 3, generator=generator("schedules"), dtype=torch.float64)
    matrix = costs(solver, fine, exact.FIELD, noise)
    found = []
    for steps in range(1, fine + 1):
        indices = schedules.least(matrix, steps)
        found.append(summed(matrix, indices))
        assert indices[0] == 0 and indices[-1] == fine and len(indices) == steps + 1
        assert found[-1] == pytest.approx(
            min(summed(matrix, each) for each in every(fine, steps)), rel=1e-12, abs=1e-15
        )
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[-1] == 0, "the fine path itself"


def test_a_cost_is_how_far_a_step_lands_from_the_path():
    """Of Euler by hand: the path of N(0, 0.3) scales its state, x_{i+1} = (1 + (t_{i+1} - t_i) g(t_i)) x_i."""
    t = uniform_grid(12).tolist()
    g = [(t_i - (1 - t_i) * 0.3) / ((1 - t_i) ** 2 * 0.3 + t_i**2) for t_i in t]
    x = list(itertools.accumulate(range(12), lambda x, i: x * (1 + (t[i + 1] - t[i]) * g[i]), initial=1.0))
    matrix = costs()
    for i, j in itertools.combinations(range(13), 2):
        assert matrix[i, j] == pytest.approx((x[i] * (1 + (t[j] - t[i]) * g[i]) - x[j]) ** 2, rel=1e-9, abs=1e-15)
    assert all(matrix[i, j].isinf() for i in range(13) for j in range(i + 1))
    both = gaussian(std=STD), torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    twice = costs(field=both[0], noise=both[1])
    assert twice[0, 12] == pytest.approx(5 * matrix[0, 12]), "the sum over elements, the mean over samples"


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_path_is_the_solvers(solver):
    noise, grid = torch.randn(5, 3, generator=generator("path"), dtype=torch.float64), uniform_grid(12)
    states, step = schedules._path(exact.FIELD, noise, {}, solver, grid)
    whole = solvers.sample(exact.FIELD, noise, {}, solver=solver, steps=12)
    assert torch.equal(states[-1], whole)
    first = solvers.SOLVERS[solver].function(exact.FIELD, noise, grid[[0, 5]], {})
    assert (step(0, 5) - first).abs().max() < 1e-12


def test_a_multistep_takes_the_step_before_for_as_long():
    noise, grid = torch.randn(5, 3, generator=generator("path"), dtype=torch.float64), uniform_grid(12)
    states, step = schedules._path(exact.FIELD, noise, {}, "dpm_solver_pp_2m", grid)
    before = exact.FIELD.interpolant.split(states[2], exact.FIELD(states[2], grid[2].expand(5), {}), grid[2].expand(5))[
        0
    ]
    now = exact.FIELD.interpolant.split(states[5], exact.FIELD(states[5], grid[5].expand(5), {}), grid[5].expand(5))[0]
    lam = [math.log((1 - t) / t) for t in grid[[2, 5, 8]].tolist()]
    data = now + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (now - before)
    t, s = grid[5].item(), grid[8].item()
    expected = s / t * states[5] + ((1 - s) - (1 - t) * s / t) * data
    assert (step(5, 8) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_straight_paths_cost_nothing(solver):
    def straight(x_t, t, cond):  # of the paths between noise and MEAN + STD noise
        t = t[:, None]
        std, mean = exact.STD, exact.MEAN
        return (std - 1) * (mean * (1 - t) - x_t) / ((1 - t) * std + t) - mean

    noise = torch.randn(5, 3, generator=generator("straight"), dtype=torch.float64)
    matrix = costs(solver, 10, exact.Network(straight), noise)
    assert matrix[matrix.isfinite()].max() < 1e-24


@pytest.mark.parametrize(("solver", "calls"), [("euler", 12), ("heun", 12 + 11 + 55), ("dpm_solver_pp_2m", 12)])
def test_what_it_costs_in_calls(solver, calls):
    """Of Heun one more for each of the 66 - 11 longer steps that do not end at data."""
    field = Counted(gaussian())
    costs(solver, field=field)
    assert field.calls == calls


def test_times_are_linear_and_begin_with_one():
    """Whatever the field's own schedule and range."""
    from distill.fields import Rescheduled
    from distill.interpolants import edm

    class Narrow:
        interpolant, t_range = edm(), (0.2, 0.9)

        def __call__(self, x_t, t, cond):
            return Rescheduled(gaussian(), edm())(x_t, t, cond)

    t_grid, _ = schedules.measure(Narrow(), UNIT, {}, solver="euler", fine=6)
    assert t_grid == pytest.approx([0.9, 0.76, 0.62, 0.48, 0.34, 0.2, 0.0])
    assert linear().time_of(torch.tensor([9.0])).item() == pytest.approx(0.9)
