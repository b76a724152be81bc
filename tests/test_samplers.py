"""Samplers with the exact velocity field and flow map: exact jumps, exact marginals, N calls from t = 1 to 0."""

import pytest
import torch

from distill.flow import solvers
from distill.flow.draws import generator
from distill.flow.times import uniform_grid
from distill.networks.velocity import VelocityStudent
from distill.students import sampling
from distill.students.samplers import euler, jump, renoise, same_noise
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap

STD = torch.tensor([0.5, 1.3, 0.2], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FIELD, FLOW_MAP = GaussianField(MEAN, STD), GaussianFlowMap(MEAN, STD)


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("samplers", name), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_n_steps_are_n_calls_the_first_at_noise_the_last_to_data(steps, dtype):  # T22
    calls, noise = [], torch.ones(3, 2, 4, 4, dtype=dtype)
    cond = {"class_labels": torch.tensor([2, 0, 1])}

    def network(x_t, *times_and_cond):  # a velocity of one carries x from 1 at t = 1 to 0 at t = 0
        *times, given = times_and_cond
        assert given is cond and all(t.shape == (3,) and t.dtype == dtype for t in times)
        calls.append(tuple(t[0].item() for t in times))
        return torch.ones_like(x_t)

    grid = uniform_grid(steps)
    starts = [pytest.approx((steps - i) / steps, abs=1e-7) for i in range(steps)]
    assert torch.allclose(euler.sample(network, noise, grid, cond), 0 * noise, atol=1e-6)
    assert [t for (t,) in calls] == starts
    calls.clear()
    assert torch.allclose(same_noise.sample(network, noise, grid, cond), 0 * noise, atol=1e-6)
    assert [t for (t,) in calls] == starts
    calls.clear()
    assert torch.allclose(jump.sample(network, noise, grid, cond), 0 * noise, atol=1e-6)
    assert [t for t, _ in calls] == starts and [s for _, s in calls] == [*starts[1:], 0.0]
    calls.clear()
    renoise.sample(network, noise, grid, cond, *[noise] * (steps - 1))
    assert [t for t, _ in calls] == starts and all(s == 0 for _, s in calls)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_euler_is_the_solver_of_the_same_name(steps):
    noise = randn("euler", 10, 3)
    expected = solvers.solve(FIELD, noise, {}, solver="euler", steps=steps)
    assert torch.equal(euler.sample(FIELD, noise, uniform_grid(steps), {}), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_going_back_to_the_same_noise_is_euler_in_two_steps_and_on_straight_paths(steps):  # T08
    noise, grid = randn("same", 10, 3), uniform_grid(steps)
    straight = exact.straight(MEAN, STD)
    euler_straight = euler.sample(straight, noise, grid, {})
    assert (euler_straight - (MEAN + STD * noise)).abs().max() < 1e-12
    assert (same_noise.sample(straight, noise, grid, {}) - euler_straight).abs().max() < 1e-12
    apart = (same_noise.sample(FIELD, noise, grid, {}) - euler.sample(FIELD, noise, grid, {})).abs().max()
    assert apart < 1e-12 if steps <= 2 else apart > 1e-3


def test_going_back_to_the_same_noise_along_any_times():
    noise, x = randn("same", 10, 3), randn("same", 10, 3)
    grid = torch.tensor([1.0, 0.9, 0.3, 0.0], dtype=torch.float64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        data = FIELD.interpolant.split(x, FIELD(x, t.expand(10), {}), t.expand(10))[0]
        x = FIELD.interpolant.mix(data, noise, s.expand(10))
    assert (same_noise.sample(FIELD, noise, grid, {}) - x).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_jumps_of_the_exact_map_are_exact_in_any_number(steps):
    noise = randn("jump", 10, 3)
    data = jump.sample(FLOW_MAP, noise, uniform_grid(steps), {})
    assert (data - (MEAN + STD * noise)).abs().max() < 1e-12


def test_renoising_jumps_to_data_and_out_again():
    noise, fresh = randn("noise", 10, 3), [randn("one", 10, 3), randn("two", 10, 3)]
    grid = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    x = noise
    for t, s, z in zip(grid[:-1], grid[1:], [*fresh, torch.zeros_like(noise)], strict=True):
        q = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        data = MEAN + STD / q * (x - (1 - t) * MEAN)  # the exact end of the path through x
        x = (1 - s) * data + s * z
    assert (renoise.sample(FLOW_MAP, noise, grid, {}, *fresh) - x).abs().max() < 1e-12
    one_step = renoise.sample(FLOW_MAP, noise, uniform_grid(1), {})
    assert (one_step - (MEAN + STD * noise)).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [2, 4])
def test_renoising_with_the_exact_map_keeps_the_marginal_exactly(steps):
    # each step is affine in (noise, fresh ...): read the coefficients, their squares must sum to the variance
    columns = torch.eye(steps, dtype=torch.float64)
    grid = uniform_grid(steps)

    def run(weights):
        inputs = [torch.full((1, 3), w.item(), dtype=torch.float64) for w in weights]
        return renoise.sample(FLOW_MAP, inputs[0], grid, {}, *inputs[1:])[0]

    offset = run(torch.zeros(steps, dtype=torch.float64))
    gains = torch.stack([run(column) - offset for column in columns])
    assert (offset - MEAN).abs().max() < 1e-12
    assert (gains.square().sum(0) - STD.square()).abs().max() < 1e-12


def test_a_sampler_that_there_is_not_is_none_of_the_others():
    with pytest.raises(AssertionError, match="there is no sampler 'renoize'"):
        sampling.by_sampler(VelocityStudent(torch.nn.Identity()), "renoize", torch.zeros(2, 3), uniform_grid(1), {}, [])


def test_renoising_refuses_a_wrong_number_of_noises_and_a_grid_that_does_not_end():
    noise = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="re-noising along 3 steps needs a grid that ends at 0 and 2 fresh noises, got"
    ):
        renoise.sample(FLOW_MAP, noise, uniform_grid(3), {}, noise)
    with pytest.raises(ValueError, match="got a grid that ends at 0.5 and 0"):
        renoise.sample(FLOW_MAP, noise, torch.tensor([1.0, 0.5]), {})
