"""Recipe boss at its exact solution (reflow sheet, 13): K long steps that end on the teacher's fine path."""

from itertools import pairwise

import pytest
import torch

from distill import testing
from distill.core.errors import InputError
from distill.flow import solvers
from distill.flow.draws import generator
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Pairs
from distill.students.samplers import euler
from distill.students.sampling import grid, own_grids
from distill.testing import exact
from recipes.reflow import boss

FINE, INDICES = uniform_grid(100), [0, 35, 60, 100]
TIMES = [FINE[i].item() for i in INDICES]
OPTIMAL = (1.0, 0.79, 0.59, 0.33, 0.0)  # `distill schedule` of the ring's teacher, 4 steps


def noise(count):
    return torch.randn(count, 3, generator=generator("boss"), dtype=torch.float64)


def trajectories(count):
    """States of the fine Euler paths of the exact field at TIMES, as a batch."""
    states = [noise(count)]
    for i, j in pairwise(INDICES):
        states.append(solvers.integrate("euler", exact.FIELD, states[-1], FINE[i : j + 1], {}))
    times = torch.tensor(TIMES, dtype=torch.float64).expand(count, -1)
    return Batch(None, Pairs(states[0], states[-1], torch.stack(states, dim=1), times), {})


def landing(x_t, t, cond):
    """The velocity of the step from each of TIMES to where the fine path is at the next."""
    found = torch.empty_like(x_t)
    for i, j in pairwise(INDICES):
        rows = (t - FINE[i]).abs() < 1e-6
        found[rows] = (solvers.integrate("euler", exact.FIELD, x_t[rows], FINE[i : j + 1], {}) - x_t[rows]) / (
            FINE[j] - FINE[i]
        )
    return found


def boss_recipe():
    return boss.Recipe(boss.Config(), exact.teacher(exact.FIELD))


def loss(function, *, count=32, **given):
    recipe = boss_recipe()
    nets = exact.nets(recipe, exact.Given(exact.Network(function)))
    (turn,) = recipe.turns(0, 0)
    return turn.loss(nets, trajectories(count), exact.context(count, **given)).total.item()


def test_at_zero_loss_the_student_ends_where_the_fine_path_ends():
    assert loss(landing) < 1e-24
    t_grid = grid(own_grids(boss_recipe(), TIMES), 3)
    given = noise(10)
    data = euler.sample(landing, given, t_grid, {})
    fine = solvers.solve(exact.FIELD, given, {}, solver="euler", steps=100)
    assert (data - fine).abs().max() < 1e-12


@pytest.mark.parametrize(("drawn", "step"), [(0.0, 0), (0.32, 0), (0.34, 1), (0.66, 1), (0.67, 2), (0.999, 2)])
def test_each_step_has_its_own_ends(drawn, step):
    """A network that is wrong by (1, 2, 3) at one of the times only."""
    off = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def wrong(x_t, t, cond):
        return landing(x_t, t, cond) + ((t - TIMES[step]).abs() < 1e-6)[:, None] * off

    assert loss(wrong, uniforms={"step": drawn}) == pytest.approx(14 / 3)
    assert loss(wrong, uniforms={"step": (drawn + 1 / 3) % 1}) < 1e-24
    assert loss(wrong, count=3000) == pytest.approx(14 / 9, rel=0.1), "uniform over the steps"


def test_the_students_times_are_those_of_its_pairs():
    assert own_grids(boss_recipe(), TIMES) == {3: TIMES}
    with pytest.raises(InputError, match="reflow/boss: all its pairs stages need the same times"):
        boss_recipe().t_grids(None)


SUBJECTS = [
    testing.Subject(
        "reflow/boss",
        steps=(4,),
        times=OPTIMAL,
        closed_form=(
            test_at_zero_loss_the_student_ends_where_the_fine_path_ends,
            lambda: test_each_step_has_its_own_ends(0.34, 1),
        ),
    )
]
