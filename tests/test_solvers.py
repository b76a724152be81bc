"""Solvers: the declared order, exact results on straight and Gaussian paths, cost, straightness."""

import math
from functools import partial

import pytest
import torch

from distill.core.errors import InputError
from distill.flow.draws import generator
from distill.flow.fields import Counted, Rescheduled, start
from distill.flow.interpolants import edm, linear, vp
from distill.flow.solvers import integrate, march, solve, straightness
from distill.flow.times import uniform_grid
from distill.solvers import find_solver, solver_names
from distill.spec import kinds
from distill.teachers.analytic import GaussianField, MixtureField
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, QuantileFlowMap, class_gaussian_teacher, trig

ODE_SOLVERS = kinds.ode_solvers()
M, VARIANCE = 0.7, 0.3
ROOT = math.sqrt(VARIANCE)
V1 = GaussianField(torch.tensor([M], dtype=torch.float64), torch.tensor([ROOT], dtype=torch.float64))

V2 = exact.straight(M, ROOT)  # the velocity after one reflow of N(M, VARIANCE) (reflow 0.6)


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("solvers", name), dtype=torch.float64)


def rk4(field, x, t_grid, cond):
    """Classical Runge-Kutta: the reference, of order 4."""

    def v(x, t):
        return field(x, torch.full((len(x),), t, dtype=torch.float64), cond)

    times = t_grid.tolist()
    for t, s in zip(times[:-1], times[1:], strict=True):
        h, middle = s - t, (t + s) / 2
        a = v(x, t)
        b = v(x + h / 2 * a, middle)
        c = v(x + h / 2 * b, middle)
        x = x + h / 6 * (a + 2 * b + 2 * c + v(x + h * c, s))
    return x


# --- known answers ---


def test_runge_kutta_on_the_gaussian_is_its_map():  # T03
    noise = randn("T03", 50, 1)
    assert (rk4(V1, noise, uniform_grid(200), {}) - (M + ROOT * noise)).abs().max() < 1e-8


def test_one_euler_step_of_v1_is_the_mean_whatever_the_noise():  # T04, fact A
    noise = randn("T04", 50, 1)
    assert (solve(V1, noise, {}, solver="euler", steps=1) - M).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_on_v2_is_exact_at_any_number_of_steps(steps):  # T04, fact B
    noise = randn("T04", 50, 1)
    assert (solve(V2, noise, {}, solver="euler", steps=steps) - (M + ROOT * noise)).abs().max() < 1e-12


def test_euler_on_v1_is_the_product_of_its_steps():  # fact D
    noise = randn("D", 20, 1)
    for steps in (2, 4, 9):
        factor, t = 1.0, [1 - i / steps for i in range(steps + 1)]
        for now, then in zip(t[:-1], t[1:], strict=True):
            factor *= 1 + (then - now) * (now - (1 - now) * VARIANCE) / ((1 - now) ** 2 * VARIANCE + now**2)
        result = solve(V1, noise, {}, solver="euler", steps=steps)
        assert (result - (M + factor * noise)).abs().max() < 1e-12
        assert steps != 4 or factor == pytest.approx(0.378445, abs=5e-7)


def test_solvers_agree_with_their_formulas_in_one_and_two_steps():
    x, grid = randn("formulas", 10, 1), torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)

    def v(x, t):
        return V1(x, torch.full((10,), t, dtype=torch.float64), {})

    euler_1 = x - 0.3 * v(x, 0.9)
    assert torch.allclose(integrate("euler", V1, x, grid[:2], {}), euler_1, rtol=1e-14)
    heun_1 = x - 0.15 * (v(x, 0.9) + v(euler_1, 0.6))
    assert torch.allclose(integrate("heun", V1, x, grid[:2], {}), heun_1, rtol=1e-14)
    # three steps of DPM-Solver++(2M): first order, second order, first order (consistency 12.1)
    grid = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=torch.float64)
    lam = ((1 - grid) / grid).log()
    data_0 = x - 0.9 * v(x, 0.9)
    x_1 = 0.6 / 0.9 * x - 0.4 * torch.expm1(lam[0] - lam[1]) * data_0
    data_1 = x_1 - 0.6 * v(x_1, 0.6)
    h, h_prev = lam[2] - lam[1], lam[1] - lam[0]
    x_2 = 0.4 / 0.6 * x_1 - 0.6 * torch.expm1(-h) * (data_1 + (data_1 - data_0) * h / (2 * h_prev))
    data_2 = x_2 - 0.4 * v(x_2, 0.4)
    x_3 = 0.2 / 0.4 * x_2 - 0.8 * torch.expm1(lam[2] - lam[3]) * data_2
    assert torch.allclose(integrate("dpm_solver_pp_2m", V1, x, grid, {}), x_3, rtol=1e-13)


# --- each sample between times of its own ---


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_march_is_the_solver_between_the_times_of_each_sample(name):
    t = torch.tensor([1.0, 0.9, 0.5, 0.3], dtype=torch.float64)
    s, x = torch.tensor([0.5, 0.1, 0.5, 0.2], dtype=torch.float64), randn("march", 4, 2)
    found = march(V1, x, t, s, {}, name, 5)
    for i in (0, 1, 3):
        grid = torch.linspace(t[i], s[i], 6, dtype=torch.float64)
        assert torch.allclose(found[i : i + 1], integrate(name, V1, x[i : i + 1], grid, {}), rtol=0, atol=1e-13)
    assert torch.equal(found[2], x[2])  # nowhere to go


def test_a_march_is_exact_on_straight_paths_and_ends_at_the_very_time():
    noise, seen = randn("straight", 3, 1), []
    t, s = torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.1, 0.3, 0.0])

    def at(time):
        time = time.double()[:, None]
        return (1 - time) * (M + ROOT * noise) + time * noise

    found = march(V2, at(t), t, s, {}, "euler", 3)
    assert (found - at(s)).abs().max() < 1e-6  # times are float32

    recorded = exact.Network(lambda x_t, t, cond: seen.append(t) or V2(x_t, t, cond))
    march(recorded, at(t), t, s, {}, "heun", 7)
    assert torch.equal(seen[0], t) and torch.equal(seen[-1], s) and len(seen) == 14


# --- order ---

STD = torch.tensor([0.5, 1.3, 0.2], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
MIXTURE = (torch.tensor([[-1.5], [0.2], [1.0]]), torch.tensor([0.5, 0.3, 0.4]), torch.tensor([0.5, 0.2, 0.3]))


def check_order(name, found):
    """That of its formula; at least the declared one, if only its first steps or its prediction are of lower order."""
    declared = find_solver(name).order
    assert declared - 0.2 < found < declared + (0.2 if name in ("euler", "heun", "ab2", "dpm_solver_pp_2m") else 2), (
        found
    )


def slope(steps, errors):
    """Least-squares slope of log error against log h."""
    h, e = -torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return (((h - h.mean()) * (e - e.mean())).sum() / (h - h.mean()).square().sum()).item()


def gaussian():
    """A field, its exact map (x, t, s) -> x_s, and noise."""
    flow_map = GaussianFlowMap(MEAN, STD)
    return GaussianField(MEAN, STD), lambda x, t, s: x + (s - t)[:, None] * flow_map(x, t, s, {}), randn("order", 32, 3)


def mixture():
    return MixtureField(*MIXTURE), QuantileFlowMap(*(p.reshape(-1) for p in MIXTURE)).jump, randn("order", 32, 1)


def errors_along(function, problem, high, low, steps):
    field, jump, x = problem
    t, s = (torch.full((len(x),), end, dtype=torch.float64) for end in (high, low))
    grids = [high + (low - high) * torch.arange(n + 1, dtype=torch.float64) / n for n in steps]
    return [(function(field, x, grid, {}) - jump(x, t, s)).square().mean().sqrt().item() for grid in grids]


@pytest.mark.parametrize("problem", [gaussian, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_the_measured_order_is_the_declared_one(problem, name):
    steps = [32, 64, 128]
    errors = errors_along(partial(integrate, name), problem(), 0.95, 0.1, steps)
    check_order(name, slope(steps, errors))


@pytest.mark.parametrize("problem", [gaussian, mixture], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["euler", "heun", "ab2"])
def test_the_order_holds_the_whole_way_from_noise_to_data(problem, name):
    steps = [64, 128, 256] if problem is gaussian else [32, 64, 128]
    errors = errors_along(partial(integrate, name), problem(), 1.0, 0.0, steps)
    assert abs(slope(steps, errors) - find_solver(name).order) < 0.12, errors


def test_dpm_solver_loses_a_logarithm_at_the_ends():
    # its steps in lambda are 1/k at k steps from either end of a uniform grid of t, which sum to h^2 ln N
    steps = [128, 256, 512]
    errors = errors_along(partial(integrate, "dpm_solver_pp_2m"), gaussian(), 1.0, 0.0, steps)
    assert 1.5 < slope(steps, errors) < 1.9
    assert abs(slope(steps, [e / math.log(n) for e, n in zip(errors, steps, strict=True)]) - 2) < 0.15, errors


@pytest.mark.parametrize("path", [trig(0.5), edm()], ids=lambda p: f"{p.name}")
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_the_order_holds_in_the_own_time_of_another_path(path, name):
    flow_map = GaussianFlowMap(MEAN, STD, path)

    def jump(x, t, s):
        return x + (s - t)[:, None] * flow_map(x, t, s, {})

    steps = [32, 64, 128]
    problem = GaussianField(MEAN, STD, path), jump, 3 * randn("own", 32, 3)
    errors = errors_along(partial(integrate, name), problem, 0.9, 0.05, steps)
    check_order(name, slope(steps, errors))


def karras_grid(steps):
    """[steps + 1]: EDM's noise levels in linear time t = sigma/(1 + sigma), then 0 (Karras et al. 2022, eq. 5)."""
    most, least = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigma = torch.linspace(most, least, steps, dtype=torch.float64) ** 7
    return torch.cat([sigma / (1 + sigma), torch.zeros(1, dtype=torch.float64)])


def test_edms_grid_and_solver_reach_the_data():
    noise, one = randn("edm", 64, 3), torch.ones(64, dtype=torch.float64)
    field = GaussianField(MEAN, STD, edm(), (0.002 / 1.002, 80 / 81))
    on_linear = Rescheduled(field, linear())
    x = start(on_linear, noise)
    truth = x - 80 / 81 * GaussianFlowMap(MEAN, STD)(x, one * 80 / 81, 0 * one, {})
    counted = Counted(on_linear)
    result = integrate("heun", counted, x, karras_grid(18), {})
    assert counted.calls == 35  # EDM: 2 N - 1
    assert (result - truth).abs().max() < 0.03
    assert (integrate("heun", on_linear, x, karras_grid(72), {}) - truth).abs().max() < 0.002


# --- sample ---


def stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return vp((1 - betas).cumprod(0))


@pytest.mark.parametrize("name", ODE_SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_cost_is_the_declared_cost(name, steps):
    for field in (V1, GaussianField(MEAN, STD, stable_diffusion()), GaussianField(MEAN, STD, edm(), (0.002, 0.98))):
        counted = Counted(field)
        solve(counted, torch.zeros(2, 3, dtype=torch.float64), {}, solver=name, steps=steps)
        assert counted.calls == find_solver(name).calls(steps), field.interpolant.name


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("path", ["vp", "edm", "trig"])
def test_any_path_samples_what_the_exact_map_gives(name, path):
    interpolant, t_range = {
        "vp": (stable_diffusion(), (0.0, 1.0)),
        "edm": (edm(), (0.002 / 1.002, 80 / 81)),
        "trig": (trig(0.5), (0.0, 1.0)),
    }[path]
    noise = randn("any", 64, 3)
    field = GaussianField(MEAN, STD, interpolant, t_range)
    linear_field = Rescheduled(field, linear())
    x = start(linear_field, noise)
    t = torch.full((64,), linear_field.t_range[1], dtype=torch.float64)
    truth = x - t[:, None] * GaussianFlowMap(MEAN, STD)(x, t, 0 * t, {})
    # VP ends with one step from t = 0.028 to the data, whose error does not vanish with the number of steps
    tolerance = 1e-2 if path == "vp" else 5e-3
    assert (solve(field, noise, {}, solver=name, steps=100) - truth).abs().max() < tolerance


def test_the_last_step_of_a_field_that_ends_above_zero_is_its_data_prediction():
    field = Rescheduled(GaussianField(MEAN, STD, stable_diffusion()), linear())
    x = randn("jump", 8, 3)
    t = torch.full((8,), field.t_range[0], dtype=torch.float64)
    data, _ = linear().split(x, field(x, t, {}), t)
    grid = torch.tensor([field.t_range[0], 0.0], dtype=torch.float64)
    for name in ODE_SOLVERS:
        assert torch.allclose(integrate(name, field, x, grid, {}), data, rtol=0, atol=1e-13)


def test_guided_pairs_are_the_map_of_the_shifted_gaussian():  # consistency 0.5
    means = torch.stack([MEAN, -MEAN])
    teacher, noise = class_gaussian_teacher(means, 0 * MEAN, STD), randn("guided", 6, 3)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    result = solve(teacher.guided(2.5), noise, {"class_labels": labels}, solver="heun", steps=200)
    assert (result - (2.5 * means[labels] + STD * noise)).abs().max() < 1e-3


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_float32_stays_float32_and_near_float64_without_gradients(name):
    noise = randn("float", 16, 3)
    exact = solve(GaussianField(MEAN, STD), noise, {}, solver=name, steps=32)
    noise = noise.float().requires_grad_()
    result = solve(GaussianField(MEAN, STD), noise, {}, solver=name, steps=32)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert (result.double() - exact).abs().max() < 1e-5
    assert integrate(name, GaussianField(MEAN, STD), noise, uniform_grid(2), {}).requires_grad


def test_wrong_grids_and_names_are_refused():
    x = torch.zeros(2, 1)
    wrong = [[0.0, 0.5, 0.2], [1.0], [[1.0, 0.0]], [1.0, 1.0]]
    for grid in map(torch.tensor, wrong):
        for name in ODE_SOLVERS:
            ways = "increasing or decreasing" if name in kinds.inverting_solvers() else "decreasing"
            with pytest.raises(ValueError, match=rf"t_grid must be \[N\+1 >= 2\] and {ways}, got \["):
                integrate(name, V1, x, grid, {})
    with pytest.raises(ValueError, match=r"and decreasing, got \[0.0, 1.0\]"):
        integrate("dpm_solver_pp_2m", V1, x, torch.tensor([0.0, 1.0]), {})
    field = GaussianField(MEAN, STD, edm(), (0.002, 0.98))
    for grid in (torch.tensor([0.99, 0.5, 0.0]), torch.tensor([0.9, 0.001, 0.0])):
        for name in ODE_SOLVERS:
            with pytest.raises(ValueError, match=r"t must be within \[0.002, 0.98\], got \["):
                integrate(name, field, x, grid, {})
    with pytest.raises(InputError, match="unknown solver 'huen': did you mean 'heun'"):
        solve(V1, x, {}, solver="huen", steps=2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        solve(V1, x, {}, solver="heun", steps=0)


# --- straightness ---


def unit(count):
    """Noise whose mean square is 1, so that the expectation over noise is exact."""
    noise = randn("unit", count, 1)
    return noise / noise.square().mean().sqrt()


def test_straightness_of_v1_is_its_closed_form_and_of_v2_zero():  # T05, fact C
    truth = ROOT * (2 - math.pi / 2)
    assert truth == pytest.approx(0.235085, abs=5e-7)
    errors = [abs(straightness(V1, unit(32), {}, steps) - truth) for steps in (130, 260, 520)]
    assert errors[-1] < 1e-3 and all(0.4 < b / a < 0.6 for a, b in zip(errors[:-1], errors[1:], strict=True))
    assert straightness(V2, unit(32), {}, 16) < 1e-24
    assert straightness(V1, unit(32), {}, 1) < 1e-24  # one step cannot bend
    # per dimension sqrt(lambda) (2 - pi/2), whatever the mean
    wide = GaussianField(MEAN, STD)
    noise = unit(32).expand(32, 3)
    assert straightness(wide, noise, {}, 400) == pytest.approx(STD.mean().item() * (2 - math.pi / 2), abs=2e-3)


def test_straightness_is_that_of_the_linear_path_whatever_the_schedule():
    noise = unit(32)
    field = GaussianField(V1.mean, V1.std, trig(0.5))
    assert straightness(field, noise, {}, 50) == pytest.approx(straightness(V1, noise, {}, 50), rel=1e-6)


def test_what_each_solver_can_do():
    assert ODE_SOLVERS == [
        "euler", "heun", "ab2", "ab3", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "ipndm3", "ipndm4", "unip3", "unipc2",
        "unipc3",
    ]  # fmt: skip
    assert set(solver_names()) == {*ODE_SOLVERS, "edm_churn", "restart", "sa"}
    assert kinds.inverting_solvers() == ["euler", "heun", "ab2", "ab3"]
    assert kinds.reference_solvers() == [name for name in ODE_SOLVERS[1:] if not name.startswith("ipndm")]
