"""The methods that benchmarks compare the solvers with: identities with known methods, known errors, exact fits."""

import copy
import math

import pytest
import torch
from benchmarks import bespoke, early_exit, fitted, multistep, two_calls
from benchmarks.solvers import mixture, table
from diffusers import UNet2DModel

from distill.flow.draws import generator
from distill.flow.interpolants import linear
from distill.flow.solvers import integrate, solve
from distill.flow.times import uniform_grid
from distill.teachers.analytic import GaussianField, MixtureField
from distill.teachers.network_field import NetworkField
from distill.testing.closed_form import trig

FIELD, NOISE, COND, TRUTH = mixture()
ZEROS = torch.zeros(3, dtype=torch.float64)


@pytest.fixture(scope="module")
def known():
    """Reference paths of the mixture from other noises than NOISE."""
    field, noise, cond, _ = mixture(0.25)
    return fitted.paths(field, noise, cond)


def rms(x):
    return x.square().mean().sqrt().item()


# --- multistep ---


@pytest.mark.parametrize("order", [3, 4])
def test_the_solvers_of_ipndm_are_those_of_the_benchmark(order):
    """GHVB without averages, in y = x/alpha."""
    expected = multistep.ghvb(FIELD, NOISE, COND, 7, order=order)
    assert torch.allclose(solve(FIELD, NOISE, COND, solver=f"ipndm{order}", steps=7), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "weights", [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)
def test_ghvb_with_beta_1_has_the_weights_of_ipndm(weights):
    assert multistep.ghvb_weights(len(weights), 1.0) == pytest.approx(weights, abs=1e-15)
    assert sum(multistep.ghvb_weights(len(weights), 0.3)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("order", [2, 3])
def test_ipndm_on_the_velocity_is_adams_bashforth(order):
    found = multistep.ghvb(FIELD, NOISE, COND, 9, order=order, on_velocity=True)
    assert (found - solve(FIELD, NOISE, COND, solver=f"ab{order}", steps=9)).abs().max() < 1e-12


def test_ghvb_of_two_averages_is_of_order_2():
    errors = [rms(multistep.ghvb(FIELD, NOISE, COND, n, order=1.5, on_velocity=True) - TRUTH) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_deis_in_ln_rho_of_order_2_is_dpm_solver_in_noise_form():
    """x'/alpha' = x/alpha - rho' (Q1 E + Q2 (E - E1)/r), where r = h_prev/h."""
    t_1, t, t_next = 0.8, 0.55, 0.35
    found = multistep.exponential_weights(t, t_next, [t, t_1], multistep.VARIABLES["ln rho"])
    h, before = (math.log(a * (1 - b) / ((1 - a) * b)) for a, b in ((t, t_next), (t_1, t)))
    q1 = math.expm1(h)
    q2, ratio, rho = q1 / h - 1, before / h, t_next / (1 - t_next)
    assert found == pytest.approx([-rho * (q1 + q2 / ratio), rho * q2 / ratio], abs=1e-12)


@pytest.mark.parametrize("variable", ["t", "rho"])
def test_deis_integrates_polynomials_of_its_variable_exactly(variable):
    t, t_next, tau = 0.6, 0.2, multistep.VARIABLES[variable]
    nodes = [0.6, 0.7, 0.9]
    weights = multistep.exponential_weights(t, t_next, nodes, tau)
    found = sum(weight * tau(node) ** 2 for weight, node in zip(weights, nodes, strict=True))
    antiderivative = {  # of tau^2 drho
        "t": lambda t: t / (1 - t) + t + 2 * math.log(1 - t),
        "rho": lambda t: (t / (1 - t)) ** 3 / 3,
    }[variable]
    assert found == pytest.approx(antiderivative(t_next) - antiderivative(t), abs=1e-12)


@pytest.mark.parametrize(
    ("order", "errors"), [(2, (0.0331, 0.0110)), (3, (0.0135, 0.0026)), (4, (0.0205, 0.0020))]
)  # fmt: skip
def test_errors_of_ipndm_on_a_mixture(order, errors):
    found = [rms(multistep.ghvb(FIELD, NOISE, COND, n, order=order) - TRUTH) for n in (8, 16)]
    assert found == pytest.approx(errors, abs=6e-5)


# --- fitted ---


def test_least_squares_on_state_and_velocities_are_exact_for_a_gaussian():
    """There, every state and velocity is a combination of the noise and the mean, so two of them span all states."""
    field = GaussianField(torch.tensor([0.7]), torch.tensor([0.5]))
    noise = torch.randn(2, 50, 1, generator=generator("fit"), dtype=torch.float64)
    known = fitted.paths(field, noise[0], {})
    sample = fitted.fit_linear(known, 2, basis=fitted.everything, to_path=True)
    reference = integrate("heun", field, noise[1], uniform_grid(fitted.FINE, 1.0, 0.0), {})
    assert (sample(field, noise[1], {}) - reference).abs().max() < 1e-9


@pytest.mark.parametrize(("to_path", "error"), [(False, 0.125), (True, 0.068)])
def test_error_of_iia_on_a_mixture(known, to_path, error):
    sample = fitted.fit_linear(known, 4, basis=fitted.changes, to_path=to_path)
    assert rms(sample(FIELD, NOISE, COND) - TRUTH) == pytest.approx(error, abs=1e-3)


def test_dc_solver_that_moves_nothing_is_unipc():
    found = fitted._dc(FIELD, NOISE, COND, 7, True, lambda *_: 1.0)
    assert (found - solve(FIELD, NOISE, COND, solver="unipc2", steps=7)).abs().max() < 1e-12


def test_predictions_are_moved_along_their_parabola():
    times = [0.4, 0.6, 0.9]
    data, *past = [(torch.tensor(1 + t - 2 * t**2), t) for t in times]
    for ratio in (0.0, 1.0, 1.3):
        u = 0.6 + ratio * (0.4 - 0.6)
        assert fitted.moved(data[0], past, 0.4, ratio).item() == pytest.approx(1 + u - 2 * u**2, abs=1e-6)


@pytest.mark.parametrize(("steps", "error"), [(6, 0.047), (8, 0.033)])
def test_error_of_dc_solver_on_a_mixture(known, steps, error):
    sample = fitted.fit_dc(known, steps, changed=False)
    assert rms(sample(FIELD, NOISE, COND) - TRUTH) == pytest.approx(error, abs=1e-3)


def test_golden_section_finds_a_minimum():
    assert fitted.smallest(lambda u: (u - 0.83) ** 2, 0.5, 1.5) == pytest.approx(0.83, abs=3e-3)


# --- two calls per step ---


def test_amed_with_r_a_half_is_dpm_solver_2():
    """u = (alpha_1/alpha) x - sigma_1 (e^(h/2) - 1) E; x' = (alpha'/alpha) x - sigma' (e^h - 1) E(u)."""
    t, s = 0.7, 0.4
    lam, lam_next = (math.log((1 - each) / each) for each in (t, s))
    h, t_1 = lam_next - lam, 1 / (1 + math.exp((lam + lam_next) / 2))

    def velocity(x, t):
        return FIELD(x, torch.full((len(x),), t, dtype=torch.float64), {})

    v = velocity(NOISE, t)
    u = (1 - t_1) / (1 - t) * NOISE - t_1 * math.expm1(h / 2) * (NOISE + (1 - t) * v)
    expected = (1 - s) / (1 - t) * NOISE - s * math.expm1(h) * (u + (1 - t_1) * velocity(u, t_1))
    assert (two_calls.noise_step(FIELD, {}, NOISE, v, t, s, ZEROS) - expected).abs().max() < 1e-12


def test_fitted_amed_is_better_than_the_midpoint_rule(known):
    midpoint = rms(two_calls.amed(FIELD, NOISE, COND, 2, lambda *_: ZEROS, True) - TRUTH)
    assert midpoint == pytest.approx(0.1207, abs=6e-5)
    assert rms(two_calls.fit_amed(known, 2, on_velocity=True)(FIELD, NOISE, COND) - TRUTH) < 0.6 * midpoint


# --- Bespoke ---


def test_bespoke_in_unchanged_time_and_scale_is_euler_or_midpoint():
    euler = bespoke.bespoke(FIELD, NOISE, COND, bespoke.scale_time(bespoke.unchanged(6)), False)
    assert (euler - solve(FIELD, NOISE, COND, solver="euler", steps=6)).abs().max() < 1e-12
    midpoint = bespoke.bespoke(FIELD, NOISE, COND, bespoke.scale_time(bespoke.unchanged(12)), True)
    assert (midpoint - two_calls.amed(FIELD, NOISE, COND, 6, lambda *_: ZEROS, True)).abs().max() < 1e-12


def test_bespoke_in_the_time_and_scale_of_another_path_is_euler_on_it():
    """On the trigonometric path k = cos + sin and t = sin/(cos + sin), of the angle (1 - r) pi/2."""
    angle = torch.linspace(math.pi / 2, 0, 9, dtype=torch.float64)
    sin, cos, rate = angle.sin(), angle.cos(), -math.pi / 2
    k, dk = sin + cos, rate * (cos - sin)
    at = bespoke.ScaleTime(sin / k, rate / k.square(), k, dk)
    field = MixtureField(FIELD.means, FIELD.std, FIELD.weights, trig())
    expected = integrate("euler", field, NOISE, torch.linspace(1, 0, 9, dtype=torch.float64), {})
    assert (bespoke.bespoke(FIELD, NOISE, COND, at, False) - expected).abs().max() < 1e-12


def test_the_bespoke_loss_is_the_sum_of_local_errors_with_their_growth(known):
    """In unchanged time, an error grows by 1 + h in each later Euler step."""
    steps, total = 3, 0.0
    times = multistep.times_of(steps)
    for i in range(steps):
        x = known.at(times[i])
        v = FIELD(x, torch.full((512,), times[i], dtype=torch.float64), {})
        error = x - v / steps - known.at(times[i + 1])
        total += (1 + 1 / steps) ** (steps - 1 - i) * error.abs().mean().item()
    at = bespoke.scale_time(bespoke.unchanged(steps))
    assert bespoke.bound(known, at, False).item() == pytest.approx(total, rel=1e-6)


# --- less network per call ---


def unet_field():
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    )  # fmt: skip
    return NetworkField(network.requires_grad_(False), linear(), "velocity", 1000.0)


def test_skipped_blocks_are_those_whose_last_convolution_is_zero():
    field, noise = unet_field(), torch.randn(3, 1, 8, 8, generator=generator("unet"))
    silenced = copy.deepcopy(field)
    for block in silenced.network.mid_block.resnets:
        torch.nn.init.zeros_(block.conv2.weight)
        torch.nn.init.zeros_(block.conv2.bias)
    plan = early_exit.PLANS["exit at mid, t > 0.5"]
    for t, expected in ((0.7, silenced), (0.3, field)):
        times = torch.full((3,), t)
        assert torch.equal(early_exit.ShortenedField(field, plan)(noise, times, {}), expected(noise, times, {}))


def test_reused_features_are_those_of_the_call_before():
    field, noise = unet_field(), torch.randn(3, 1, 8, 8, generator=generator("unet"))
    short, times = early_exit.ShortenedField(field, early_exit.PLANS["reuse, every 2nd"]), torch.full((3,), 0.4)
    first, second = (short(noise, times, {}) for _ in range(2))
    assert torch.equal(first, field(noise, times, {}))
    assert torch.equal(second, first)
    assert not torch.equal(short(noise, times / 2, {}), first)


def test_the_cost_of_a_plan_is_counted_in_full_calls():
    share = early_exit.shares(unet_field(), torch.zeros(1, 1, 8, 8), {})
    assert 0 < share["reuse"] < share["no coarse"] < share["no mid"] < share["full"] == 1
    plan = early_exit.PLANS["exit at mid, t > 0.5"]
    assert early_exit.cost(plan, 4, share) == pytest.approx(2 + 2 * share["no mid"])  # times 1, 0.75; 0.5, 0.25


def test_the_table_has_a_dash_where_a_method_was_not_measured():
    head, line = table("digits, calls:", {"method": {4: 0.25, 16: 0.0123}})
    assert head.split() == ["digits,", "calls:", "4", "6", "8", "10", "16", "20"]
    assert line.split() == ["method", "0.2500", "-", "-", "-", "0.0123", "-"]
