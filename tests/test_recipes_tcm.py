"""Recipe tcm at its exact solution (sheet consistency 2.2): no loss at the flow map, and who makes which target."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.flow.interpolants import like
from distill.testing import exact
from recipes.consistency import tcm
from recipes.consistency.tcm import Config, Recipe


def jump(x_t, t, s, cond):
    return x_t + like(s - t, x_t).double() * exact.FLOW_MAP(x_t, t, s, cond)


def velocity(x_t, t, s, cond):
    """Not the flow map."""
    return exact.FIELD(x_t, t, cond)


def loss(student, first, count=64, **options):
    made = Recipe(Config(**options), exact.teacher(exact.FIELD))
    nets = {"student": exact.Network(student), "first": exact.Network(first)}
    (turn,) = made.turns(0, 0)
    return turn.loss(nets, exact.batch(count), exact.context(count)).total


@pytest.fixture
def exact_step(monkeypatch):
    monkeypatch.setattr(tcm.solvers, "step", lambda teacher, x_t, t, s, cond, solver: jump(x_t, t, s, cond))


@pytest.mark.parametrize("truncation", [0.3, 0.5])
def test_the_exact_flow_map_has_no_loss_under_an_exact_step(truncation, exact_step):  # T1
    options = {"point": "euler", "truncation": truncation, "closeness": 0.05, "huber_c": 1e-3}
    assert loss(exact.FLOW_MAP, exact.FLOW_MAP, **options) < 1e-5
    for student, first in ((velocity, exact.FLOW_MAP), (exact.FLOW_MAP, velocity)):
        assert loss(student, first, **options) > 1e-2, "each part has a loss"


def test_the_frozen_model_makes_the_targets_of_the_boundary_alone():
    seen = {}

    def of(name):
        def called(x_t, t, s, cond):
            seen.setdefault(name, []).append(t)
            return exact.FLOW_MAP(x_t, t, s, cond)

        return called

    loss(of("student"), of("first"), count=200, closeness=0.05)
    (below,), (target, prediction) = seen["first"], seen["student"]
    assert len(below) == 50 and (below < 0.5).all()
    assert len(target) == 150 and (target >= 0.5).all()
    assert len(prediction) == 200 and (prediction >= 0.5).all() and (prediction == 0.5).sum() == 50


def test_only_the_student_gets_gradients():
    shifts = {name: nn.Parameter(torch.zeros(3, dtype=torch.float64)) for name in ("student", "first")}
    networks = [lambda x, t, s, cond, by=by: velocity(x, t, s, cond) + by for by in shifts.values()]
    loss(*networks).backward()
    assert shifts["student"].grad.abs().min() > 0 and shifts["first"].grad is None


def test_the_parts_are_means_of_their_own_samples(monkeypatch):
    """A loss of 1 at the boundary and 10 elsewhere: 10 + 0.1."""

    def distance(prediction, target, scale):
        return (1 + 9.0 * (torch.arange(len(prediction)) % 4 != 3)) * gap

    made, context = Recipe(Config(), None), exact.context(64)
    edge = context.draw.split(0.25, exact.batch(64).data).mask
    assert torch.equal(edge, torch.arange(64) % 4 == 3)
    gap = made.neighbours(context.draw.uniform("t", exact.batch(64).data), edge)[2]
    monkeypatch.setattr(tcm.distances, "pseudo_huber", distance)
    assert loss(exact.FLOW_MAP, exact.FLOW_MAP).item() == pytest.approx(10.1, rel=1e-5)


@pytest.mark.parametrize("truncation", [0.3, 0.5, 0.8])
def test_times_have_the_density_of_a_truncated_student_t(truncation):
    """(1 + (y / 0.02)^2)^(-1/2) of y = log sigma - log sigma', up to sigma 80."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    made = Recipe(Config(truncation=truncation), None)
    t, s, gap = made.neighbours(u, torch.zeros(len(u), dtype=torch.bool))
    first = math.log(truncation / (1 - truncation))
    y, end = t.logit() - first, math.log(80) - first
    edges = torch.tensor([0.001, 0.01, 0.05, 0.5, 0.9], dtype=torch.float64) * end
    grid = torch.linspace(0, 1, 400_001, dtype=torch.float64) ** 3 * end  # fine near 0
    density = torch.rsqrt(1 + (grid / 0.02).square())
    below = torch.cumulative_trapezoid(density, grid)
    expected = [(below[torch.searchsorted(grid, edge) - 1] / below[-1]).item() for edge in edges]
    assert [(y < edge).double().mean().item() for edge in edges] == pytest.approx(expected, abs=1e-3)
    assert (s >= truncation).all() and (gap > 0).all() and torch.allclose(t - s, gap, rtol=1e-6)


def test_its_students_are_sampled_at_times_that_they_were_trained_for():
    grids = Recipe(Config(truncation=0.4), None).t_grids(None)
    assert grids == {
        1: [1.0, 0.0],
        2: [1.0, 0.4, 0.0],
        3: [1.0, 0.7, 0.4, 0.0],
        4: pytest.approx([1, 0.8, 0.6, 0.4, 0]),
    }


def test_options_without_effect_are_refused():
    with pytest.raises(ValidationError, match="guidance_scale has no effect with point: data"):
        Config(point="data", guidance_scale=2.0)
    assert Config().needs == {"data", "weights", "teacher"} and Config(point="data").needs == {"data", "weights"}


SUBJECTS = [
    testing.Subject(
        "consistency/tcm",
        {"closeness": 0.05},  # closer, rounding of the two ends decides in float32
        steps=(1, 2),
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            test_the_frozen_model_makes_the_targets_of_the_boundary_alone,
            lambda: test_times_have_the_density_of_a_truncated_student_t(0.5),
        ),
    ),
]
