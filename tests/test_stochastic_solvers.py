"""Stochastic solvers: identities, exact variances on a Gaussian, known numbers, agreement with diffusers, their limits.

On a Gaussian the velocity is affine in x, so a sample is affine in its noises. `responses` finds the coefficients. The
sum of their squares is the exact variance, without random numbers.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import SASolverScheduler

from distill.cli import arguments
from distill.core.errors import InputError
from distill.flow.draws import generator
from distill.flow.fields import Counted
from distill.flow.interpolants import Coefficients, Interpolant, edm, linear, vp
from distill.flow.solvers import FieldOde, integrate, solve
from distill.flow.times import uniform_grid
from distill.solvers import Step, _exponential, edm_churn, find_solver, restart, sa, solver_names
from distill.solvers._noising import noised
from distill.spec import kinds
from distill.spec.guidancespec import UNCHANGED
from distill.spec.model import EvaluateStage, GaussianTeacher, PairsStage
from distill.students import sampling, step_times
from distill.teachers.analytic import GaussianField, MixtureField, gaussian_teacher
from distill.testing.closed_form import GaussianFlowMap

CPU = torch.device("cpu")
VARIANCE, M = 0.3, 0.7
STD = math.sqrt(VARIANCE)
NAMES = sorted(set(solver_names()) - set(kinds.ode_solvers()))
MIXTURE = MixtureField(torch.tensor([[-1.0], [1.2]]), torch.tensor([0.3, 0.4]), torch.tensor([0.4, 0.6]))


def gaussian(interpolant=None, t_range=(0.0, 1.0), mean=M):
    """A field of N(mean, VARIANCE)."""
    mean, std = (torch.tensor([each], dtype=torch.float64) for each in (mean, STD))
    return GaussianField(mean, std, interpolant, t_range)


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("stochastic", name), dtype=torch.float64)


def of_ratio(ratio):
    """Linear-path times of noise-to-signal ratios sigma/alpha."""
    return ratio / (1 + ratio)


def in_lambda(steps, high=20.0, low=0.05):
    """[steps + 1]: linear-path times between two ratios sigma/alpha, evenly spaced in lambda."""
    return of_ratio(torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64))


def exploding(most=80.0):
    """alpha = 1, sigma = most t: on this path Heun's method in t is that in sigma, as in EDM."""

    def path(t):
        one = torch.ones_like(t)
        return Coefficients(one, most * t, 0 * t, most * one)

    return Interpolant("exploding", path, lambda ratio: ratio / most)


def responses(run, count):
    """(mean, [1 + count]): run(x, fresh) with zero noises, and its derivatives by x and by each fresh noise."""
    unit = torch.eye(2 + count, dtype=torch.float64)[:, 1:]  # row 0: all zero; row 1 + k: only noise k is one
    x, *fresh = (unit[:, k : k + 1] for k in range(1 + count))
    end = run(x, fresh).squeeze(1)
    return end[0].item(), end[1:] - end[0]


def std(name, field, grid):
    """The standard deviation at the end of a grid, from the exact distribution at its beginning."""
    solver, c = find_solver(name), field.interpolant.path(grid[:1])
    scale, count = (c.alpha**2 * VARIANCE + c.sigma**2).sqrt(), solver.noises(len(grid) - 1) if solver.noises else 0
    _, found = responses(lambda x, fresh: integrate(name, field, scale * x, grid, {}, fresh), count)
    return found.square().sum().sqrt().item()


def steps_of(field, grid, one_step, x, fresh):
    """x after one_step(ode, x, data, at) along a grid of times."""
    ode, times, past = FieldOde(field, {}, fresh), grid.tolist(), []
    for i, (t, t_next) in enumerate(pairwise(times)):
        data = ode.data(x, t)
        at = Step(t, t_next, past[:2], len(times) - 1 - i, False, times)
        x, past = one_step(ode, x, data, at), [(data, t), *past]
    return x


# --- SA-Solver ---


@pytest.mark.parametrize(("tau", "order"), [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)])
def test_predictions_are_those_of_known_solvers(tau, order):  # S13
    """Without noise DDIM, and DPM-Solver++(2M) in its form of Heun; with tau = 1 their SDE versions."""

    def known(ode, x, data, at):
        (alpha, sigma), (alpha_next, sigma_next) = ode.path(at.t), ode.path(at.t_next)
        h = math.log(alpha_next * sigma / (alpha * sigma_next))
        q = 1 + tau**2
        p1 = 1 - math.exp(-q * h)
        x_next = sigma_next / sigma * math.exp(-(tau**2) * h) * x + alpha_next * p1 * data
        if order == 2 and at.past:
            data1, t1 = at.past[0]
            slope = (data - data1) * h / _exponential.length(ode, t1, at.t)
            x_next = x_next + alpha_next * (1 - p1 / (q * h)) * slope
        return x_next + sigma_next * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * fresh[len(grid) - 1 - at.left]

    grid, x = torch.tensor([0.95, 0.8, 0.5, 0.3, 0.1], dtype=torch.float64), randn("x", 40, 1)
    fresh = [randn(f"fresh {k}", 40, 1) for k in range(4)]
    found = steps_of(MIXTURE, grid, lambda *given: sa.predicted(*given, tau, order), x, fresh)
    assert (found - steps_of(MIXTURE, grid, known, x, fresh)).abs().max() < 1e-12
    if tau == 0:
        ddim = integrate("euler", MIXTURE, x, grid, {})
        assert ((found - ddim).abs().max() < 1e-12) == (order == 1)


def test_with_tau_of_0_a_step_from_noise_and_one_to_data_are_ddim(monkeypatch):
    monkeypatch.setattr(sa, "TAU", 0.0)
    x, fresh = randn("x", 40, 1), [randn("z", 40, 1)]
    for high, low in ((1.0, 0.4), (0.6, 0.0), (1.0, 0.0)):
        grid = torch.tensor([high, low], dtype=torch.float64)
        euler = integrate("euler", MIXTURE, x, grid, {})
        assert (integrate("sa", MIXTURE, x, grid, {}, fresh) - euler).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("places", "degree"), [([], 0), ([-1.3], 1), ([1.0], 1), ([1.0, -0.8], 2), ([-0.7, -1.9], 2)])
def test_the_weights_integrate_polynomials_of_lambda_exactly(tau, places, degree):
    """sum of the weights times u_j^k = integral of q e^{-q (h - l)} (l/h)^k over l from 0 to h."""
    h, q = 0.9, 1 + tau**2
    found = sa.weights(q * h, places)
    at = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * h
    for k in range(1, degree + 1):
        integral = (q * torch.exp(-q * (h - at)) * (at / h) ** k).mean().item() * h
        assert sum(w * u**k for w, u in zip(found, places, strict=True)) == pytest.approx(integral, abs=1e-9)


@pytest.mark.parametrize(("p", "c"), [(1, 2), (2, 2), (2, 3), (3, 3)])
def test_sa_makes_the_steps_of_the_stock_scheduler(p, c, monkeypatch):  # S04
    """Up to its deviation: with one more prediction, the stock code uses the first term of P2."""
    exact_weights = sa.weights
    monkeypatch.setattr(sa, "weights", lambda h, u: [h / 2 / u[0]] if len(u) == 1 else exact_weights(h, u))
    stock = SASolverScheduler(
        predictor_order=p, corrector_order=c, lower_order_final=False, use_flow_sigmas=True,
        prediction_type="flow_prediction", tau_func=lambda t: 1.0 if 200 <= t <= 800 else 0.0,
    )  # fmt: skip
    stock.set_timesteps(11)
    stock.sigmas = stock.sigmas.double()[:-1]  # the last one is repeated: a step without length
    grid, tau = stock.sigmas.tolist(), [stock.tau_func(t) for t in stock.timesteps.tolist()]
    theirs = ours = randn("stock", 64, 1)
    fresh = [torch.randn(64, 1, dtype=torch.float64, generator=generator("fresh", k)) for k in range(10)]
    ode, past, before = FieldOde(MIXTURE, {}, fresh), [], None
    for i, (t, t_next) in enumerate(pairwise(grid)):
        v = MIXTURE(theirs, torch.full((64,), t, dtype=torch.float64), {})
        theirs = stock.step(v, stock.timesteps[i], theirs, generator=generator("fresh", i)).prev_sample
        data = ode.data(ours, t)
        if before is not None:
            ours = sa.corrected(ode, *before, data, tau[i - 1], c)
        at = Step(t, t_next, past[:2], 10 - i, False, grid)
        before, ours = (ours, data, at), sa.predicted(ode, ours, data, at, tau[i], p)
        past = [(data, t), *past]
        assert (theirs - ours).abs().max() < 1e-12, i


def relative_error(run, steps):
    """The error of a standard deviation at sigma/alpha = 0.05, from the exact one at 20; run(grid, x, fresh) -> end."""
    grid = in_lambda(steps)
    before, after = (math.sqrt((1 - t) ** 2 * VARIANCE + t**2) for t in (grid[0].item(), grid[-1].item()))
    mean, found = responses(lambda x, fresh: run(grid, before * x + (1 - grid[0]) * M, fresh), steps)
    assert mean == pytest.approx((1 - grid[-1].item()) * M, abs=1e-12)
    return found.square().sum().sqrt().item() / after - 1


@pytest.mark.parametrize(("order", "expected"), [(1, 0.96), (2, 2.03)])
def test_weak_orders_of_predictions_with_tau_of_1(order, expected):
    def run(grid, x, fresh):
        return steps_of(gaussian(), grid, lambda *given: sa.predicted(*given, 1.0, order), x, fresh)

    errors = [relative_error(run, steps) for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.005), errors


def test_with_its_corrector_sa_is_of_one_order_more(monkeypatch):
    monkeypatch.setattr(sa, "RANGE", (0.0, math.inf))

    def run(grid, x, fresh):
        return integrate("sa", gaussian(), x, grid, {}, fresh)

    errors = [relative_error(run, steps) for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.94, abs=0.01), errors


# --- EDM's sampler ---


def karras(steps):
    """[steps + 1]: EDM's noise levels sigma/80 from 1 to 0.002/80, then 0 (Karras et al. 2022, eq. 5)."""
    sigma = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64) ** 7
    return torch.cat([sigma / 80, torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize(("churn", "s_noise", "expected"), [(0, 1, 1.05376), (40, 1, 1.12185), (40, 1.007, 1.12970)])
def test_churn_inflates_the_standard_deviation_as_its_recursion_says(churn, s_noise, expected, monkeypatch):
    """In 18 steps on EDM's path and grid, with noise at all levels; it is above 1 by the error of Heun's method."""
    for name, value in {"S_CHURN": churn, "S_NOISE": s_noise, "S_MIN": 0, "S_MAX": math.inf}.items():
        monkeypatch.setattr(edm_churn, name, value)
    assert std("edm_churn", gaussian(exploding()), karras(18)) / STD == pytest.approx(expected, abs=5e-6)


def test_without_churn_it_is_heun(monkeypatch):
    x, fresh = randn("x", 30, 1), [randn("z", 30, 1)] * 9
    monkeypatch.setattr(edm_churn, "S_CHURN", 0.0)
    assert torch.equal(
        solve(MIXTURE, x, {}, solver="edm_churn", steps=9, fresh=fresh), solve(MIXTURE, x, {}, solver="heun", steps=9)
    )


def test_noise_levels_are_raised_within_bounds():
    """By the factor 1 + gamma, but not above S_MAX's condition, the field's highest level, or at pure noise."""
    ode, grid = FieldOde(gaussian(t_range=(0.0, 0.9)), {}), [0.9, 0.8, 0.5, 0.04, 0.0]

    def raised(t):
        return edm_churn._raised(ode, Step(t, 0.0, (), 1, True, grid))

    gamma = math.sqrt(2) - 1  # 40 / 4 steps is more
    assert raised(0.5) == pytest.approx((1 + gamma) * 0.5 / (1 + gamma * 0.5), abs=1e-15)
    assert raised(0.9) == 0.9 and raised(0.89) == pytest.approx(0.9, abs=1e-15)
    assert edm_churn.S_MIN > 0.04 / 0.96 and raised(0.04) == 0.04
    pure = FieldOde(gaussian(), {})
    assert edm_churn._raised(pure, Step(1.0, 0.0, (), 1, True, [1.0, 0.0])) == 1.0
    ten = [0.5] * 101
    assert edm_churn._raised(pure, Step(0.5, 0.0, (), 1, True, ten)) == pytest.approx(1.4 / 2.4, abs=1e-15)


# --- restart ---


@pytest.mark.parametrize("path", [linear(), edm()], ids=lambda each: each.name)
def test_added_noise_keeps_the_marginal_distribution(path):
    ode, (t, t_up) = FieldOde(gaussian(path), {}), (0.2, 0.45)
    (alpha, sigma), (alpha_up, sigma_up) = ode.path(t), ode.path(t_up)
    scale = math.sqrt(alpha**2 * VARIANCE + sigma**2)
    mean, found = responses(lambda x, fresh: noised(ode, alpha * M + scale * x, t, t_up, fresh[0]), 1)
    assert mean == pytest.approx(alpha_up * M, abs=1e-12)
    assert found.square().sum().item() == pytest.approx(alpha_up**2 * VARIANCE + sigma_up**2, abs=1e-12)


def test_a_pass_contracts_an_excess_variance():
    """By (v + low^2)/(v + high^2) for data of variance v, whatever the noise; Heun's steps come close to it."""
    low, high = 0.14, 0.30
    t, t_up = of_ratio(low), of_ratio(high)
    ode = FieldOde(gaussian(), {})
    one = torch.ones(3, dtype=torch.float64)
    back = GaussianFlowMap(gaussian().mean, gaussian().std)

    def exactly(x, fresh):
        x = noised(ode, x, t, t_up, fresh[0])
        return x + (t - t_up) * back(x, t_up * one, t * one, {})

    def solved(x, fresh):
        return restart._again(FieldOde(gaussian(), {}, fresh), x, t, restart.RestartInterval(low, high, 300, 1), 0)

    for run, tolerance in ((exactly, 1e-12), (solved, 1e-7)):
        mean, found = responses(run, 1)
        assert found[0].item() ** 2 == pytest.approx((VARIANCE + low**2) / (VARIANCE + high**2), abs=tolerance)
        assert found[0].item() ** 2 == pytest.approx(0.81949, abs=5e-6)
        variance = (1 - t) ** 2 * VARIANCE + t**2  # kept if it is the right one
        assert (found[0] ** 2 * variance + found[1] ** 2).item() == pytest.approx(variance, abs=tolerance)


def test_restart_without_passes_is_heun_and_with_them_reduces_its_error(monkeypatch):  # S12
    errors = [std(name, gaussian(exploding()), karras(18)) / STD - 1 for name in ("heun", "restart")]
    assert errors == pytest.approx([0.05376, 0.03798], abs=5e-6)
    x, fresh = randn("x", 30, 1), [randn("z", 30, 1), randn("y", 30, 1)]
    heuns = solve(MIXTURE, x, {}, solver="heun", steps=9)
    assert not torch.equal(solve(MIXTURE, x, {}, solver="restart", steps=9, fresh=fresh), heuns)
    monkeypatch.setattr(restart, "INTERVALS", ())
    assert torch.equal(solve(MIXTURE, x, {}, solver="restart", steps=9), heuns)


def test_restart_makes_the_calls_of_the_authors_and_refuses_too_few_steps():
    assert restart.calls(18) == 43 and restart.noises(18) == 2
    assert find_solver("restart").least_steps == 5 and all(
        find_solver(name).least_steps == 1 for name in ("sa", "heun")
    )
    x, fresh = randn("x", 2, 1), [randn("z", 2, 1)] * 2
    assert solve(gaussian(), x, {}, solver="restart", steps=5, fresh=fresh).isfinite().all()
    with pytest.raises(
        InputError, match="^restart needs a time with sigma/alpha between 0 and 0.3, but none of the 4 st"
    ):
        solve(gaussian(), x, {}, solver="restart", steps=4, fresh=fresh)


# --- all of them ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [5, 6, 18, 40])
def test_cost_is_the_declared_cost(name, steps):
    """Also for fields that end above t = 0: a step to there, and one to data without a call at its end."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    solver, x = find_solver(name), torch.zeros(2, 1, dtype=torch.float64)
    fresh = [x] * solver.noises(steps)
    for field in (gaussian(), gaussian(vp((1 - betas).cumprod(0))), gaussian(edm(), (0.002, 80 / 81))):
        counted = Counted(field)
        solve(counted, x, {}, solver=name, steps=steps, fresh=fresh)
        assert counted.calls == solver.calls(steps), field.interpolant.name


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_exact_spread_and_do_not_depend_on_the_block(name):
    """The noises of the 4,000 samples are independent of each other and of the first."""
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[M], std=[STD]))
    method = sampling.of_teacher(teacher, name, 8, UNCHANGED)
    assert (method.nfe, method.fresh) == (find_solver(name).calls(8), find_solver(name).noises(8))
    whole, parts = (
        torch.cat([each.samples for each in sampling.blocks(method, teacher, seed=3, count=count, block=n, device=CPU)])
        for count, n in ((4000, 4000), (10, 3))
    )
    assert torch.allclose(whole[:10], parts, rtol=0, atol=1e-6)
    expected = std(name, gaussian(), uniform_grid(8))
    assert abs(whole.std().item() / expected - 1) < 3 / math.sqrt(2 * 4000)
    assert abs(whole.mean().item() - M) < 3 * expected / math.sqrt(4000)


@pytest.mark.parametrize("name", NAMES)
def test_noises_are_asked_for(name):
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=f"^{name} takes {find_solver(name).noises(6)} noises in 6 steps, got 0$"):
        solve(gaussian(), x, {}, solver=name, steps=6)
    with pytest.raises(ValueError, match="^heun takes 0 noises in 6 steps, got 1$"):
        solve(gaussian(), x, {}, solver="heun", steps=6, fresh=[x])


@pytest.mark.parametrize("name", NAMES)
def test_they_are_only_for_sampling(name, tmp_path):
    """Not for pairs, references or step times, and not from data to noise."""
    for stage in (
        {"kind": "pairs", "count": 10, "solver": name},
        {"kind": "evaluate", "students": {}, "fine_solver": name},
    ):
        with pytest.raises(InputError, match=rf"solver: '{name}' given; must be .*'heun'.*'unipc3'") as refused:
            arguments.stage(PairsStage if stage["kind"] == "pairs" else EvaluateStage, stage)
        assert not any(f"'{each}'" in str(refused.value).partition("must be")[2] for each in NAMES)
    assert find_solver(name).calls_inverting is None and not find_solver(name).is_reference
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[M], std=[STD]))
    with pytest.raises(
        InputError, match=f"^solver '{name}' draws noise, so its steps have no error.*use euler, heun, .*"
    ):
        step_times.find(teacher, tmp_path, device=CPU, solver=name)
