"""Recipe progressive at its exact solution (sheet consistency 9.1): half steps of the teacher, and their weights."""

import pytest
import torch

from distill import testing
from distill.testing import exact
from recipes.shortcut.progressive import Config, Recipe


def halves(n):
    """The velocity of two Euler steps of 1/(2n) of the exact field."""

    def velocity(x_t, t, cond):
        first = exact.FIELD(x_t, t, cond)
        return (first + exact.FIELD(x_t - first / (2 * n), t - 0.5 / n, cond)) / 2

    return velocity


def loss(student, count=64, **options):
    made = Recipe(Config(**options), exact.teacher(exact.FIELD))
    (turn,) = made.turns(0, 0)
    return turn.loss({"student": exact.Network(student)}, exact.batch(count), exact.context(count)).total


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("options", [{}, {"weight": "plus_one", "distance": "l1"}])
def test_two_half_steps_of_the_teacher_are_one_step(n, options):  # T1
    assert loss(halves(n), steps=n, **options) < 1e-12 < 1e-4 < loss(exact.FIELD, steps=n, **options)


def test_a_chain_of_halvings_is_the_finest_euler_chain():
    """8 -> 4 -> 2 -> 1 steps, each stage with the optimum of the one before as its teacher."""
    x, one = exact.batch(64).data, torch.ones(64, dtype=torch.float64)
    field = exact.Network(exact.FIELD)
    for n in (4, 2, 1):
        field = exact.Network(Recipe(Config(steps=n), exact.teacher(field)).target)
    at = x
    for k in range(8):
        at = at - exact.FIELD(at, one - k / 8, {}) / 8
    assert (x - field(x, one, {}) - at).abs().max() < 1e-12
    at_once = Recipe(Config(steps=1, teacher_steps=8), exact.teacher(exact.FIELD)).target(x, one, {})
    assert (x - at_once - at).abs().max() < 1e-12


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_weights_are_those_of_the_papers_for_data(distance):
    """max(SNR, 1) |dx|^2, (SNR + 1) |dx|^2 and |dx|^2, with dx = t du."""
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    ratio, square = ((1 - t) / t).square(), t.square()
    expected = {
        "truncated": ratio.clamp(min=1) * square,
        "plus_one": (ratio + 1) * square,
        "data": square,
        "velocity": torch.ones(3, dtype=torch.float64),
    }
    for weight, right in expected.items():
        found = Recipe(Config(weight=weight, distance=distance), None).factor(t)
        assert torch.allclose(found if distance == "l2" else found.square(), right)


def test_a_student_is_sampled_with_its_number_of_steps_alone():
    assert Recipe(Config(steps=4), None).t_grids(None) == {4: [1.0, 0.75, 0.5, 0.25, 0.0]}


SUBJECTS = [
    testing.Subject(
        "shortcut/progressive",
        ring={"teacher_steps": 16},
        closed_form=(
            lambda: test_two_half_steps_of_the_teacher_are_one_step(4, {}),
            test_a_chain_of_halvings_is_the_finest_euler_chain,
        ),
    ),
]
