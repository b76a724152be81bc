"""The sampler of the FlowTurbo benchmark."""

import torch
from benchmarks import flowturbo

from distill.flow import solvers
from distill.flow.draws import generator
from distill.testing import exact

TIMES = [1.0, 0.8, 0.6, 0.4, 0.2]
NOISE = torch.randn(5, 3, generator=generator("flowturbo"), dtype=torch.float64)


def velocity(x, t):
    return exact.FIELD(x, torch.full((len(x),), t, dtype=torch.float64), {})


def no_refiner(x, t, seen):
    raise AssertionError("a step that is not a refiner's")


def test_with_the_exact_change_a_refiner_step_is_heuns():
    heun = solvers.integrate("heun", exact.FIELD, NOISE, torch.tensor(TIMES, dtype=torch.float64), {})
    for steps in (0, 1, 4):
        found = flowturbo.sample(velocity, lambda x, t, seen: velocity(x, t) - seen + seen, NOISE, TIMES, steps, 0)
        assert (found - heun).abs().max() < 1e-12


def test_without_a_change_the_velocity_stays():
    """After a Heun step, all further steps go along the velocity that was seen at its end."""
    found = flowturbo.sample(velocity, lambda x, t, seen: seen, NOISE, TIMES, 1, 0)
    end = NOISE - 0.2 * velocity(NOISE, 1.0)
    expected = NOISE - 0.1 * (velocity(NOISE, 1.0) + velocity(end, 0.8)) - 0.6 * velocity(end, 0.8)
    assert (found - expected).abs().max() < 1e-12


def test_a_pseudo_corrector_step_corrects_the_step_of_ab2():
    """The state before its correction is ab2's: the next velocity is known, and the end of the step is not yet used."""
    seen = []

    def kept(x, t):
        seen.append(x)
        return velocity(x, t)

    found = flowturbo.sample(kept, no_refiner, NOISE, TIMES, 1, 3)
    grid = torch.tensor(TIMES, dtype=torch.float64)
    along = [*solvers.states("ab2", exact.FIELD, NOISE, grid, {})]
    assert len(seen) == 5, "two calls of the Heun step, and one of each other step"
    assert all((ours - theirs).abs().max() < 1e-12 for ours, theirs in zip(seen[1:], along, strict=True))
    assert (found - along[-1]).abs().max() > 1e-4
    last = flowturbo.sample(velocity, lambda x, t, seen: seen, NOISE, TIMES, 1, 2)
    assert (last - along[-1]).abs().max() < 1e-12, "a last refiner step without a change is ab2's"


def test_splits_cost_what_they_may():
    found = list(flowturbo.splits(4, 0.25))
    assert (1, 0, 4) in found and (1, 2, 0) in found and (2, 0, 0) in found and (1, 1, 2) in found
    assert all(2 * heun + pseudo + 2 * 0.25 * refined <= 4 for heun, pseudo, refined in found)
