"""Distributions of times against their stated densities, stratification, and the time grids of samplers."""

import math

import pytest
import torch
from scipy.stats import kstest, norm

from distill.flow import times
from distill.flow.draws import Rows, StepDraw


def draws(count=20000, name="u"):
    return StepDraw(0, 0, 0, Rows(0, count, count)).uniform(name, torch.zeros(count)).double()


def logit_normal_cdf(mean, std):
    return lambda t: norm.cdf((torch.logit(torch.as_tensor(t)).numpy() - mean) / std)


def u_shaped_cdf(t):
    t = (t - 1e-5) / (1 - 2e-5)
    return (torch.sinh(4 * (torch.as_tensor(t) - 0.5)).numpy() + math.sinh(2)) / (2 * math.sinh(2))


LAWS = {
    "uniform": (times.uniform, lambda t: t),
    "uniform to 0.999": (lambda u: times.uniform(u, 0.0, 0.999), lambda t: t / 0.999),
    "logit-normal": (times.logit_normal, logit_normal_cdf(0, 1)),
    "EDM": (lambda u: times.logit_normal(u, -1.2, 1.2), logit_normal_cdf(-1.2, 1.2)),
    "u-shaped": (times.u_shaped, u_shaped_cdf),
    "exp10": (times.exp10, lambda t: (10**t - 1) / 9),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_follow_their_densities(name):  # T09
    law, cdf = LAWS[name]
    assert kstest(law(draws(name=name)).numpy(), cdf).pvalue > 0.01


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws_are_increasing_and_stay_within_zero_and_one(name, dtype):
    law, cdf = LAWS[name]
    below_one = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    u = torch.cat([torch.linspace(0, 0.9999, 1000, dtype=dtype), below_one[None], torch.ones(1, dtype=dtype)])
    t = law(u)
    assert t.dtype == dtype and (t.diff() >= 0).all() and t.min() >= 0 and t.max() <= 1
    inner = slice(1, 1000)
    assert torch.as_tensor(cdf(t[inner].double())).sub(u[inner]).abs().max() < (
        1e-4 if dtype is torch.float32 else 1e-9
    )


def test_u_shaped_has_the_density_of_its_sampler():  # reflow 0.7: t = w or 1 - w, w = ln(1 + U (e^A - 1)) / A
    w = torch.log1p(draws(name="w") * math.expm1(4)) / 4
    t = torch.where(draws(name="side") < 0.5, w, 1 - w)
    assert kstest(t.numpy(), lambda t: u_shaped_cdf(t * (1 - 2e-5) + 1e-5)).pvalue > 0.01


def test_one_of_several_is_as_likely_as_any_other_and_never_beyond_the_last():
    found, counts = times.one_of(8, draws(8000, "one of")).unique(return_counts=True)
    assert found.tolist() == [*range(8)] and (counts - 1000).abs().max() < 4 * math.sqrt(1000)
    below_one = torch.nextafter(torch.ones(1), torch.zeros(1))  # the greatest draw in float32
    assert all(times.one_of(count, below_one).item() == count - 1 for count in range(1, 1001))


def test_logit_normal_is_normal_in_log_sigma():
    t = times.logit_normal(draws(), -1.2, 1.2)
    log_sigma = (t / (1 - t)).log()
    assert kstest(((log_sigma + 1.2) / 1.2).numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_times_are_as_likely_and_one_is_among_them(dtype):
    t = times.discrete(draws(8000, "discrete").to(dtype), 8)
    found, counts = t.unique(return_counts=True)
    assert found.tolist() == [k / 8 for k in range(1, 9)]
    assert (counts - 1000).abs().max() < 4 * math.sqrt(1000)
    below_one = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert times.discrete(torch.stack([torch.zeros((), dtype=dtype), below_one]), 10).tolist() == pytest.approx(
        [0.1, 1]
    )


@pytest.mark.parametrize(
    "u", [torch.tensor(0.5), torch.full((2, 1), 0.5), torch.full((2,), 0.5, dtype=torch.bfloat16)], ids=str
)
def test_laws_refuse_other_shapes_and_half_precision(u):
    for law, _ in LAWS.values():
        with pytest.raises(ValueError, match=r"u must be \[B\] in float32 or float64, got"):
            law(u)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_laws_refuse_what_is_no_uniform_draw(value):
    for law, _ in LAWS.values():
        with pytest.raises(ValueError, match=r"u must be within \[0, 1\], got \["):
            law(torch.tensor([0.5, value]))


def test_laws_refuse_wrong_parameters():
    u = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        times.logit_normal(u, 0.0, 0.0)
    with pytest.raises(ValueError, match="need 0 <= low < high <= 1, got low=0.5, high=0.2"):
        times.uniform(u, 0.5, 0.2)
    with pytest.raises(ValueError, match="need sharpness > 0 and 0 <= margin < 0.5, got -1"):
        times.u_shaped(u, -1.0)


def test_a_law_by_name_is_that_law():
    u = draws(100)
    for name in ("uniform", "u_shaped", "exp10"):
        assert torch.equal(times.law(name)(u), getattr(times, name)(u))
    assert torch.equal(times.law("logit_normal", -1.2, 1.2)(u), times.logit_normal(u, -1.2, 1.2))
    assert torch.equal(times.law("logit_normal")(u), times.logit_normal(u))
    with pytest.raises(ValueError, match="unknown time law 'exp': did you mean 'exp10'"):
        times.law("exp")
    with pytest.raises(
        ValueError, match="mu and sigma have no effect with time_law: uniform; remove them or use logit_normal"
    ):
        times.law("uniform", 0.0)


# --- windows ---


def test_a_border_is_the_start_of_the_window_below_it():
    t = torch.tensor([1.0, 0.9, 0.75, 0.7499, 0.3, 0.25, 0.1, 0.0])
    t_s, t_e = times.window(t, times.uniform_grid(4))
    assert t_s.tolist() == [1, 1, 0.75, 0.75, 0.5, 0.25, 0.25, 0.25] and t_s.dtype == t.dtype
    assert t_e.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0, 0, 0]
    t_s, t_e = times.window(torch.tensor([0.95, 0.2], dtype=torch.float64), torch.tensor([1.0, 0.3, 0.0]))
    assert t_s.tolist() == [1, pytest.approx(0.3)] and t_e.tolist() == [pytest.approx(0.3), 0]


@pytest.mark.parametrize("num", [3, 7, 10, 30])
def test_rounding_moves_no_border_into_the_window_above(num):
    """Float32 has 0.1 above, and 0.7 below, what float64 has."""
    t = times.discrete(torch.linspace(0, 0.99999, 997), num)
    t_s, t_e = times.window(t, times.uniform_grid(num))
    assert (t_s - t).abs().max() < 1e-6 and ((t_s - t_e) - 1 / num).abs().max() < 1e-6


def test_window_grids_spread_the_steps_over_the_windows():
    grids = times.window_grids(times.uniform_grid(4))
    assert [*grids] == [*range(4, 17)]
    for steps in (4, 8, 12, 16):
        assert grids[steps] == pytest.approx(times.uniform_grid(steps).tolist(), abs=1e-15)
    assert grids[6] == [1, 0.875, 0.75, 0.625, 0.5, 0.25, 0]  # one more in each of the first 6 % 4
    borders = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    assert times.window_grids(borders, 3) == {2: [1, 0.4, 0], 3: [1, 0.7, 0.4, 0]}
    assert [*times.window_grids(times.uniform_grid(20))] == [20]


# --- grids ---


def test_uniform_grid_is_one_minus_i_over_n():
    for steps in (1, 2, 4, 16, 1000):
        grid = times.uniform_grid(steps)
        assert grid.tolist() == [(steps - i) / steps for i in range(steps + 1)]


@pytest.mark.parametrize("steps", [1, 2, 16, 33, 34, 100])
def test_uniform_grid_calls_no_field_below_its_range(steps):
    t_min, t_max = 0.028341, 0.935958
    grid = times.uniform_grid(steps, t_max, t_min)
    assert len(grid) == steps + 1 and grid[0] == t_max and grid[-1] == 0 and (grid.diff() < 0).all()
    assert grid[-2] >= t_min
    spacing = grid[:-1].diff()
    assert steps == 1 or (spacing - spacing[0]).abs().max() < 1e-15
    if t_max / steps >= t_min:  # equal steps down to 0
        assert (grid.diff() + t_max / steps).abs().max() < 1e-15


@pytest.mark.parametrize("sharpness", [0.5, 8.0, 20.0])
def test_sigmoid_grid_is_its_formula_symmetric_with_exact_ends(sharpness):
    for steps in (1, 2, 3, 4, 9, 16):
        grid = times.sigmoid_grid(steps, sharpness)
        sigmoid = [1 / (1 + math.exp(-sharpness * (0.5 - i / steps))) for i in range(steps + 1)]
        assert grid.tolist() == pytest.approx([(s - sigmoid[-1]) / (sigmoid[0] - sigmoid[-1]) for s in sigmoid])
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert torch.equal(grid + grid.flip(0), torch.ones(steps + 1, dtype=torch.float64))
    assert (times.sigmoid_grid(7, 1e-3) - times.uniform_grid(7)).abs().max() < 1e-8


def test_grids_refuse_what_is_no_grid():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        times.uniform_grid(0)
    with pytest.raises(ValueError, match="steps must be at least 1, got -1"):
        times.uniform_grid(-1)
    with pytest.raises(ValueError, match="0 <= t_min < t_max <= 1, got t_min=0.5, t_max=0.4"):
        times.uniform_grid(4, 0.4, 0.5)
    with pytest.raises(ValueError, match="sharpness must be positive, got 0"):
        times.sigmoid_grid(4, 0.0)
