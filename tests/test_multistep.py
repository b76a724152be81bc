"""Multistep solvers: known answers, orders, identities among them, agreement with diffusers' schedulers."""

import math
from itertools import pairwise

import pytest
import torch
from benchmarks import solvers as bench
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from distill.flow.draws import generator
from distill.flow.solvers import FieldOde, integrate, solve, states
from distill.solvers import Step, _exponential, _unipc, find_solver
from distill.teachers.analytic import MixtureField
from distill.testing import exact
from distill.testing.closed_form import QuantileFlowMap

MEAN, STD, WEIGHT = (torch.tensor(each, dtype=torch.float64) for each in ([-1.0, 1.2], [0.3, 0.4], [0.4, 0.6]))
FIELD = MixtureField(MEAN[:, None], STD, WEIGHT)
MAP = QuantileFlowMap(MEAN, STD, WEIGHT)
NOISE = torch.special.ndtri((torch.arange(512, dtype=torch.float64) + 0.5) / 512)[:, None]
LAMBDA = ["dpm_solver_pp_2m", "dpm_solver_pp_3m", "unip3", "unipc2", "unipc3"]


def truth(x, high, low):
    """The exact map of the mixture between two times."""
    t = torch.full((len(x),), high, dtype=torch.float64)
    return MAP.jump(x, t, torch.full_like(t, low))


def rms(x):
    return x.square().mean().sqrt().item()


def of_ratio(ratio):
    """Linear-path times t = ratio/(1 + ratio) of noise-to-signal ratios sigma/alpha."""
    return ratio / (1 + ratio)


def in_lambda(steps, high=0.9, low=0.1):
    """[steps + 1]: times from high to low, evenly spaced in lambda = ln((1 - t)/t)."""
    ends = math.log10(high / (1 - high)), math.log10(low / (1 - low))
    return of_ratio(torch.logspace(*ends, steps + 1, dtype=torch.float64))


def in_time(steps, high=0.9, low=0.1):
    """[steps + 1]: evenly spaced times from high to low."""
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


class Polynomial:
    """A field on the linear path whose data prediction is a polynomial of ln(alpha/sigma), the same for all x."""

    def __init__(self, *coefficients):
        self.coefficients = coefficients
        self.interpolant, self.t_range = FIELD.interpolant, (0.0, 1.0)

    def data(self, t):
        return sum(c * ((1 - t) / t).log() ** k for k, c in enumerate(self.coefficients))

    def __call__(self, x_t, t, cond):
        t = t[:, None]
        return (x_t - self.data(t)) / t


# --- known answers ---


@pytest.mark.parametrize(
    ("name", "errors"),  # RMS errors with 4, 8 and 20 network calls from noise to data
    [
        ("dpm_solver_pp_2m", (0.1570, 0.0510, 0.0059)), ("dpm_solver_pp_3m", (0.1570, 0.0748, 0.0111)),
        ("ipndm3", (0.1232, 0.0135, 0.0015)), ("ipndm4", (0.1715, 0.0205, 0.0010)),
        ("unipc2", (0.1093, 0.0508, 0.0030)), ("unipc3", (0.1093, 0.0682, 0.0061)),
        ("ab2", (0.0903, 0.0257, 0.0051)), ("ab3", (0.1276, 0.0157, 0.0022)),
    ],
)  # fmt: skip
def test_errors_on_a_mixture(name, errors):
    found = [rms(solve(FIELD, NOISE, {}, solver=name, steps=n) - truth(NOISE, 1.0, 0.0)) for n in (4, 8, 20)]
    assert found == pytest.approx(errors, abs=6e-5)


@pytest.mark.parametrize(("name", "degree"), [("ab2", 1), ("ab3", 2)])
def test_velocities_that_are_polynomials_of_time_are_integrated_exactly(name, degree):
    solver, x = find_solver(name), torch.zeros(1, 1, dtype=torch.float64)
    times = [0.9, 0.75, 0.5, 0.2]  # steps of different lengths
    past = [(torch.full_like(x, t**degree), t) for t in reversed(times[2 - degree : 2])]
    at = Step(times[2], times[3], past, left=1, to_data=False)
    found = solver.step(FieldOde(FIELD, {}), x, torch.full_like(x, times[2] ** degree), at)
    assert found.item() == pytest.approx((0.2 ** (degree + 1) - 0.5 ** (degree + 1)) / (degree + 1), abs=1e-15)


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [("unipc2", (0.3, -0.7)), ("dpm_solver_pp_3m", (0.3, -0.7, 0.4)), ("unipc3", (0.3, -0.7, 0.4))],
)
@pytest.mark.parametrize("h", [1e-3, 0.5, 3.0])
def test_data_predictions_that_are_polynomials_of_lambda_are_integrated_exactly(name, coefficients, h):
    """Once the history is full; UniPC with its corrector (2) or its predictor alone (3)."""
    field, solver = Polynomial(*coefficients), find_solver(name)
    lambdas = [-0.4, -0.4 + 0.6 * h, -0.4 + 1.5 * h, -0.4 + 2.5 * h]
    nodes = [1 / (1 + math.exp(each)) for each in lambdas]
    ode, x = FieldOde(field, {}), torch.full((1, 1), 0.8, dtype=torch.float64)
    seen = [solver.look(ode, x, t) for t in nodes]
    at = Step(nodes[2], nodes[3], [(seen[1], nodes[1]), (seen[0], nodes[0])][: solver.memory], left=2, to_data=False)
    found = solver.step(ode, x, seen[2], at)
    if name == "unipc2":
        found = solver.correct(ode, x, seen[2], at, seen[3])
    # x'/sigma' = x/sigma + integral of e^lambda D(lambda), by Gauss-Legendre
    points, weights = _gauss(40)
    u = lambdas[2] + (points + 1) / 2 * (lambdas[3] - lambdas[2])
    data = sum(c * u**k for k, c in enumerate(coefficients))
    integral = (weights * u.exp() * data).sum() / 2 * (lambdas[3] - lambdas[2])
    expected = nodes[3] * (x / nodes[2] + integral)
    assert (found - expected).abs().max() < 1e-12


def _gauss(count):
    """Points and weights of Gauss-Legendre quadrature on [-1, 1]."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return points, 2 * vectors[0] ** 2


# --- orders ---


@pytest.mark.parametrize(
    ("name", "order"), [("ab2", 2), ("dpm_solver_pp_2m", 2), ("dpm_solver_pp_3m", 2), ("unipc2", 3), ("unipc3", 3.5)]
)
def test_orders_between_finite_ends(name, order):
    x, grid = truth(NOISE, 1.0, 0.9), in_time if name == "ab2" else in_lambda
    errors = [rms(integrate(name, FIELD, x, grid(n), {}) - truth(x, 0.9, 0.1)) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) > order - 0.15, errors


@pytest.mark.parametrize(
    ("name", "half", "order"), [("ab3", 1, 3), ("dpm_solver_pp_3m", 1, 3), ("dpm_solver_pp_3m", 2, 2)]
)
def test_orders_with_exact_starts(name, half, order, monkeypatch):
    """With half the weight of the parabola, as in the authors' code, 3M is of order 2."""
    weights = _exponential.integrals
    monkeypatch.setattr(_exponential, "integrals", lambda h: (*weights(h)[:2], weights(h)[2] / half))
    solver, ode, errors = find_solver(name), FieldOde(FIELD, {}), []
    for n in (160, 320):
        times = (in_time if name == "ab3" else in_lambda)(n).tolist()
        x0 = truth(NOISE, 1.0, times[0])
        past = [(solver.look(ode, truth(x0, times[0], t), t), t) for t in times[:2]][::-1]
        x = truth(x0, times[0], times[2])
        for i in range(2, n):
            seen = solver.look(ode, x, times[i])
            x = solver.step(ode, x, seen, Step(times[i], times[i + 1], past, n - i, False))
            past = [(seen, times[i]), *past][:2]
        errors.append(rms(x - truth(x0, times[0], times[-1])))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), errors


# --- identities ---


@pytest.mark.parametrize("name", ["ab2", "ab3", *LAMBDA])
def test_one_step_is_eulers(name):
    for grid in ([1.0, 0.0], [0.8, 0.3]):
        grid = torch.tensor(grid, dtype=torch.float64)
        found, euler = (integrate(each, FIELD, NOISE, grid, {}) for each in (name, "euler"))
        assert (found - euler).abs().max() < 1e-12


def test_unipc_of_order_2_without_its_corrector_is_dpm_solver_2m():
    ode, times = FieldOde(FIELD, {}), [*in_lambda(10).tolist(), 0.0]
    x, past = NOISE, []
    for i, (t, t_next) in enumerate(pairwise(times)):
        seen = ode.data(x, t)
        at = Step(t, t_next, past[:1], 11 - i, to_data=True)
        x, past = _unipc.predict(ode, x, seen, at), [(seen, t), *past]
    found = integrate("dpm_solver_pp_2m", FIELD, NOISE, torch.tensor(times, dtype=torch.float64), {})
    assert (found - x).abs().max() < 1e-12


def test_states_are_those_after_the_correction():
    """From noise, the first step is DDIM with the mean of the data predictions at its two ends."""
    grid = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    ode, (first, _) = FieldOde(FIELD, {}), list(states("unipc2", FIELD, NOISE, grid, {}))
    data = ode.data(NOISE, 1.0)
    data_next = ode.data(0.5 * NOISE + 0.5 * data, 0.5)
    assert (first - (0.5 * NOISE + 0.5 * (data + data_next) / 2)).abs().max() < 1e-12


def test_ab2_on_equal_steps_is_flowturbos_pseudo_corrector():
    """Each step repeats the last one's trapezoid with the velocity found at its end; the last has none."""
    steps, x = 8, NOISE
    h, before = -1 / steps, None
    for i in range(steps):
        v = FIELD(x, torch.full((512,), 1 - i / steps, dtype=torch.float64), {})
        if before is not None:
            x = x + h / 2 * (v - before)  # the correction of the step before, made after the next velocity is known
        x, before = x + h * v, v
    assert (solve(FIELD, NOISE, {}, solver="ab2", steps=steps) - x).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["ab2", "ab3"])
def test_straight_paths_are_followed_exactly_and_back(name):
    noise = torch.randn(20, 1, generator=generator("straight"), dtype=torch.float64)
    field = exact.straight(0.7, 0.5)
    data = solve(field, noise, {}, solver=name, steps=5)
    assert (data - (0.7 + 0.5 * noise)).abs().max() < 1e-12
    back = integrate(name, field, data, torch.linspace(0, 1, 6, dtype=torch.float64), {})
    assert (back - noise).abs().max() < 1e-12


def test_integrals_of_short_steps_keep_their_digits():
    for h in (1e-8, 1e-3, 0.0099, 0.0101, 0.5):
        p1, p2, p3 = _exponential.integrals(h)
        points, weights = _gauss(30)
        u = (points + 1) / 2 * h
        for found, power in ((p1, 0), (p2, 1), (p3, 2)):
            expected = (weights * (u - h).exp() * (u / h) ** power).sum().item() * h / 2
            assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.long
@pytest.mark.process
def test_fewer_calls_on_a_trained_teacher(tmp_path):
    found = bench.errors(*bench.digits(bench.trained(tmp_path)))
    for name, each in found.items():
        print(name, each)
    order = ["ab3", "ab2", "unipc2", "dpm_solver_pp_2m", "euler"]
    at_eight = [found[name][8] for name in order]
    assert at_eight == sorted(at_eight)
    assert found["ab3"][8] <= 0.75 * found["dpm_solver_pp_2m"][8]


# --- diffusers ---


STOCK = {
    "dpm_solver_pp_2m": (DPMSolverMultistepScheduler, 2),
    "dpm_solver_pp_3m": (DPMSolverMultistepScheduler, 3),
    "unipc2": (UniPCMultistepScheduler, 2),
    "unipc3": (UniPCMultistepScheduler, 3),
    "unip3": (UniPCMultistepScheduler, 3),
}


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_scheduler_makes_the_same_steps(name, monkeypatch):
    """In ten steps with the same field; the stock weight of 3M's parabola is half of ours."""
    scheduler_class, order = STOCK[name]
    options = {"disable_corrector": list(range(10))} if name == "unip3" else {}
    scheduler = scheduler_class(final_sigmas_type="zero", solver_order=order, **options)
    scheduler.set_timesteps(10)
    ratios = scheduler.sigmas.double()

    def scales(ratio):
        """alpha of the linear and of the variance-preserving path."""
        return 1 / (1 + ratio), 1 / (1 + ratio**2).sqrt()

    linear, preserving = scales(ratios[0])
    start = NOISE * (ratios[0] ** 2 * linear**2 + linear**2).sqrt()
    x = start / linear * preserving
    for ratio, timestep in zip(ratios[:-1], scheduler.timesteps, strict=True):
        (linear, preserving), t = scales(ratio), of_ratio(ratio)
        ours = x / preserving * linear
        v = FIELD(ours, torch.full((512,), t.item(), dtype=torch.float64), {})
        x = scheduler.step(ours + (1 - t) * v, timestep, x).prev_sample
    weights = _exponential.integrals
    monkeypatch.setattr(_exponential, "integrals", lambda h: (*weights(h)[:2], weights(h)[2] / 2))
    found = integrate(name, FIELD, start, of_ratio(ratios), {})
    assert (found - x).abs().max() < 2e-6
