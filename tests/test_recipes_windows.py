"""Recipes perflow, proreflow, seqrf and rectified_diffusion at their exact solutions (reflow sheet 6-9, T11-T13)."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.core.errors import InputError
from distill.flow import distances, solvers, windows
from distill.flow.draws import generator
from distill.flow.fields import Rescheduled
from distill.flow.interpolants import Coefficients, like, linear, vp
from distill.flow.times import uniform_grid, window
from distill.protocols import Batch, Pairs
from distill.students.samplers import euler
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher
from recipes.reflow import perflow, proreflow, rectified_diffusion, reflow, seqrf

MEAN, STD, FIELD = exact.MEAN, exact.STD, exact.FIELD
TEACHER = exact.teacher(FIELD)
QUARTERS = (1.0, 0.75, 0.5, 0.25, 0.0)
UNEQUAL = torch.tensor([1.0, 0.875, 0.5, 0.0], dtype=torch.float64)
ONLINE = [(perflow, {}), (proreflow, {}), (rectified_diffusion, {"form": "phased"})]


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("windows", name), dtype=torch.float64)


def spread(t):
    """r(t), the standard deviation of x_t [B, 3]."""
    return ((1 - t) ** 2 * STD.square() + t**2).sqrt()


def oracle(borders, mean=None):
    """v*, the velocity of the straight lines across the windows of the exact paths (sheet 7)."""

    def velocity(x, t, cond):
        t_s, t_e = (like(each, x).double() for each in window(t, borders))
        at, m = like(t, x).double(), MEAN if mean is None else mean(cond)
        r_s, r_e = spread(t_s), spread(t_e)
        length = r_e + (r_s - r_e) * (at - t_e) / (t_s - t_e)
        return -m + (r_s - r_e) / (t_s - t_e) * (x - (1 - at) * m) / length

    return exact.Network(velocity)


def stepped(borders, solver, steps, mean=None):
    """The same of the paths that so many steps of a solver make: around the mean they only shrink."""
    centred = GaussianField(torch.zeros(3), STD)

    def velocity(x, t, cond):
        t_s, t_e = window(t, borders)
        end = solvers.march(centred, torch.ones_like(x), t_s, t_e, {}, solver, steps)
        t_s, t_e, at, m = like(t_s, x), like(t_e, x), like(t, x), MEAN if mean is None else mean(cond)
        growth = (end - 1) / (t_e - t_s)  # of a point that starts at distance 1 from the mean
        return -m + growth * (x - (1 - at) * m) / (1 + growth * (at - t_s))

    return exact.Network(velocity)


def loss(module, options, student, batch, ctx=None, teacher=TEACHER, classes=None):
    made = module.Recipe(module.Config(**options), teacher)
    nets = exact.nets(made, exact.Given(student, num_classes=classes))
    (turn,) = made.turns(0, 0)
    count = len(batch.data if batch.pairs is None else batch.pairs.data)
    return turn.loss(nets, batch, exact.context(count) if ctx is None else ctx)


def fit(module, options, batch, u):
    """(intercept, slope) [2, 3] of the student, affine in each coordinate, with the least loss at the draw u of t."""
    count = len(batch.data if batch.pairs is None else batch.pairs.data)
    ctx = exact.context(count, uniforms={"t": u, "segment": 0.3})

    def of(parameter):
        return loss(
            module, options, exact.Network(lambda x, t, cond: parameter[0] + parameter[1] * x), batch, ctx
        ).total

    start = torch.zeros(2, 3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(of, start).reshape(6, 6)
    return torch.linalg.solve(hessian, -torch.autograd.functional.jacobian(of, start).flatten()).reshape(2, 3)


def coefficients(field, t):
    """(intercept, slope) [2, 3] of a field that is affine in each coordinate."""
    at, zero, one = torch.tensor([t]), torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    return torch.cat([field(zero, at, {}), field(one, at, {}) - field(zero, at, {})])


def trajectories(count, times=QUARTERS):
    """Exact paths of the teacher, with their states."""
    noise, t = randn("paths", count, 3), torch.tensor(times)
    states = [(1 - at) * MEAN + spread(torch.tensor(at, dtype=torch.float64)) * noise for at in times]
    return Batch(None, Pairs(noise, states[-1], torch.stack(states, 1), t.expand(count, -1)), {})


def segments(count):
    """From noised data across one window, the window in turn."""
    k, latent, data = torch.arange(count) % 4, randn("noise", count, 3), exact.batch(count).data
    times = torch.tensor(QUARTERS)
    t_s, t_e = times[k], times[k + 1]
    start = linear().mix(data, latent, t_s)
    end = start + like(t_e - t_s, start) * exact.FLOW_MAP(start, t_s, t_e, {})
    return Batch(None, Pairs(latent, data, torch.stack([start, end], 1), torch.stack([t_s, t_e], 1)), {})


# --- the oracle itself ---


@pytest.mark.parametrize("borders", [uniform_grid(1), uniform_grid(2), uniform_grid(4), UNEQUAL], ids=len)
def test_one_euler_step_a_window_is_the_teachers_map(borders):  # T12
    noise = randn("map", 50, 3)
    assert (euler.sample(oracle(borders), noise, borders, {}) - (MEAN + STD * noise)).abs().max() < 1e-8
    assert (euler.sample(FIELD, noise, borders, {}) - (MEAN + STD * noise)).abs().max() > 1e-2


def test_the_oracle_of_many_steps_of_the_teacher_is_that_of_its_ode():
    x, t, borders = randn("limit", 64, 3), torch.linspace(0, 1, 64), uniform_grid(4)
    errors = [(stepped(borders, "heun", n)(x, t, {}) - oracle(borders)(x, t, {})).abs().max() for n in (8, 16, 32)]
    assert all(3.5 < a / b < 5 for a, b in pairwise(errors)) and errors[-1] < 2e-3


def test_grids_go_through_all_borders_and_are_exact_at_the_oracle():
    noise = randn("grids", 20, 3)
    for module, options in [(perflow, {"windows": 3}), (proreflow, {"windows": 2}), ONLINE[2]]:
        made = module.Recipe(module.Config(**options), TEACHER)
        grids, k = made.t_grids(None), len(made.borders) - 1
        assert [*grids] == [*range(k, 17)] and {*made.borders.tolist()} <= {*grids[k + 1]}
        for grid in grids.values():
            found = euler.sample(oracle(made.borders), noise, torch.tensor(grid, dtype=torch.float64), {})
            assert (found - (MEAN + STD * noise)).abs().max() < 1e-6  # the network's times are float32
    sequential = seqrf.Recipe(seqrf.Config(), TEACHER)
    assert [*sequential.t_grids(QUARTERS)] == [*range(4, 17)] and sequential.t_grids((1.0, 0.5, 0.0))[2] == [1, 0.5, 0]
    with pytest.raises(InputError, match="reflow/seqrf: all its pairs stages need the same times"):
        sequential.t_grids(None)
    assert rectified_diffusion.Recipe(rectified_diffusion.Config(), None).t_grids(None) == {}


def test_a_student_of_starts_takes_one_step_a_window():
    for module, options in [(perflow, {}), (proreflow, {})]:
        made = module.Recipe(module.Config(times_per_window=1, **options), TEACHER)
        assert made.t_grids(None) == {4: [*QUARTERS]}
    assert seqrf.Recipe(seqrf.Config(times_per_segment=1), TEACHER).t_grids([1.0, 0.5, 0.0]) == {2: [1, 0.5, 0]}


# --- perflow ---


@pytest.mark.parametrize("parameterisation", ["velocity", "diff_eps", "ddim_eps"])
@pytest.mark.parametrize("options", [{}, {"solver": "heun", "solver_steps": 3}, {"windows": 3, "times_per_window": 5}])
def test_perflow_loss_is_zero_at_the_straight_segments_only(parameterisation, options):  # T12
    given = {**options, "parameterisation": parameterisation}
    c = perflow.Config(**given)
    right = stepped(uniform_grid(c.windows), c.solver, c.solver_steps)
    assert loss(perflow, given, right, exact.batch(256)).total < 1e-12
    assert loss(perflow, given, exact.Network(FIELD), exact.batch(256)).total > 1e-3


@pytest.mark.parametrize("u", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("parameterisation", ["velocity", "diff_eps", "ddim_eps"])
def test_perflow_regresses_to_the_straight_segments(u, parameterisation):
    """Whatever the weight: within a window a path is known from any of its points."""
    found = fit(perflow, {"parameterisation": parameterisation}, exact.batch(64), u)
    assert (found - coefficients(stepped(uniform_grid(4), "euler", 8), u)).abs().max() < 1e-6


def eps_form(kind, t_s, t_e):
    """lambda_s and eta_s of the sheet's section 7, with the linear path's alpha = 1 - t and sigma = t; t_s < 1."""
    if kind == "diff_eps":  # sqrt(1 - gamma^2), for a schedule whose alpha^2 + sigma^2 is not 1
        gamma = (1 - t_s) / (1 - t_e)
        return 1 / gamma, -(t_s**2 - (gamma * t_e) ** 2).sqrt() / gamma
    ratio = (1 - t_e) / (1 - t_s)
    return ratio, t_e - ratio * t_s


@pytest.mark.parametrize("kind", ["diff_eps", "ddim_eps"])
def test_the_eps_forms_decode_to_the_end_of_the_window_from_all_of_it(kind):  # T12
    z_s, eps = randn("z_s", 1, 3), randn("eps", 1, 3)
    for t_s, t_e in torch.tensor([[0.8, 0.5], [0.5, 0.25], [0.25, 0.0]], dtype=torch.float64):
        lambda_s, eta_s = eps_form(kind, t_s, t_e)
        z_e = lambda_s * z_s + eta_s * eps
        data, noise = linear().split(z_e, (z_e - z_s) / (t_e - t_s), t_e[None])
        if kind == "ddim_eps":  # eps stays along the window
            assert torch.allclose(noise, eps, atol=1e-12)
        else:  # the forward process, from the end to the start
            gamma = (1 - t_s) / (1 - t_e)
            assert torch.allclose(z_s, gamma * z_e + (t_s**2 - (gamma * t_e) ** 2).sqrt() * eps, atol=1e-12)
        for t in torch.lerp(t_e, t_s, torch.linspace(0.01, 1, 9, dtype=torch.float64)):
            one = t.expand(1)
            segment = windows.Segment(z_s, z_e, t_s.expand(1), t_e.expand(1))
            z_t, q = segment.at(one), lambda_s * (t - t_s) + (t_e - t)
            lambda_t, eta_t = lambda_s * (t_e - t_s) / q, eta_s * (t_e - t) / q
            assert torch.allclose(lambda_t * z_t + eta_t * eps, z_e, atol=1e-8)
            # a velocity v of the student is its eps = (z_t + (t_e - t) v - lambda_t z_t) / eta_t
            v = randn("v", 1, 3)
            students = (z_t + (t_e - t) * v - lambda_t * z_t) / eta_t
            slope = perflow.eps_slope(kind, one, segment.t_s, segment.t_e)
            assert torch.allclose(students - eps, slope * (v - segment.velocity), atol=1e-8)
            if kind == "ddim_eps":
                assert slope.item() == pytest.approx(1 - t.item())


@pytest.mark.parametrize("kind", ["diff_eps", "ddim_eps"])
def test_perflow_loss_is_the_error_of_eps(kind):
    """Of what the sheet's decoding makes of the student's velocity, in the windows that begin below t = 1."""
    u, count = 0.4, 64
    ctx, data = exact.context(count, uniforms={"t": u}), exact.batch(count).data
    found = loss(perflow, {"parameterisation": kind}, exact.Network(FIELD), Batch(data, None, {}), ctx).total
    t, t_s, t_e = (torch.full((count, 1), each).double() for each in (u, 0.5, 0.25))
    z_s = 0.5 * data + 0.5 * ctx.draw.normal("noise", data)
    z_e = solvers.integrate("euler", FIELD, z_s, torch.linspace(0.5, 0.25, 9, dtype=torch.float64), {})
    lambda_s, eta_s = eps_form(kind, t_s, t_e)
    z_t, q = z_s + (z_e - z_s) * (t - t_s) / (t_e - t_s), lambda_s * (t - t_s) + (t_e - t)
    lambda_t, eta_t = lambda_s * (t_e - t_s) / q, eta_s * (t_e - t) / q
    students = (z_t + (t_e - t) * FIELD(z_t, t.squeeze(1), {}) - lambda_t * z_t) / eta_t
    expected = (students - (z_e - lambda_s * z_s) / eta_s).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_first_window_weighs_alike_in_both_eps_forms():
    """gamma = 0 there: eps is the noise it starts from, and no velocity at t = 1 changes it."""
    t, one = torch.linspace(0.75, 1, 5), torch.ones(5)
    for kind in ("diff_eps", "ddim_eps"):
        assert torch.allclose(perflow.eps_slope(kind, t, one, 0.75 * one), 1 - t, atol=1e-6)


@pytest.mark.parametrize("u", [0.25, 0.7])
def test_perflow_with_one_window_is_reflow(u):
    data = exact.batch(32).data
    ctx = exact.context(32, uniforms={"t": u})
    noise = ctx.draw.normal("noise", data)
    ends = solvers.integrate("euler", FIELD, noise, uniform_grid(8), {})
    for student in (exact.Network(FIELD), exact.Network(lambda x, t, cond: 0.3 * x)):
        one = loss(perflow, {"windows": 1}, student, Batch(data, None, {}), ctx).total
        other = loss(reflow, {}, student, Batch(None, Pairs(noise, ends), {}), ctx).total
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_perflow_trains_at_the_times_it_says():
    seen = {}
    student = exact.Network(lambda x, t, cond: seen.update(t=t) or FIELD(x, t, cond))
    count = 6000
    loss(perflow, {"times_per_window": 2}, student, exact.batch(count))
    times, counts = seen["t"].unique(return_counts=True)
    assert times.tolist() == [k / 8 for k in range(1, 9)] and (counts - count / 8).abs().max() < 4 * math.sqrt(
        count / 8
    )
    loss(perflow, {}, student, exact.batch(count))
    assert len(seen["t"].unique()) > 5900 and seen["t"].mean().item() == pytest.approx(0.5, abs=0.02)


MEANS, NULL = torch.stack([MEAN, -MEAN]), 0.5 * MEAN
LABELS = torch.arange(512) % 2
ROWS = torch.cat([MEANS, NULL[None]])
LABELLED = Batch(exact.batch(512).data, None, {"class_labels": LABELS})


def of_classes(options, rows, labels=None):
    """The loss where v* has these means by class, looked up by `labels`, else by what the student is shown."""
    seen = {}

    def mean(cond):
        seen.update(cond)
        return rows[cond["class_labels"] if labels is None else labels]

    student = stepped(uniform_grid(4), "euler", 8, mean)
    classes = class_gaussian_teacher(MEANS, NULL, STD)
    return loss(perflow, options, student, LABELLED, teacher=classes, classes=2).total, seen["class_labels"]


def test_perflow_bakes_guidance_in():
    guided = NULL + 2.5 * (MEANS - NULL)
    assert of_classes({"guidance_scale": 2.5}, guided)[0] < 1e-12
    assert of_classes({"guidance_scale": 2.5}, MEANS)[0] > 1e-1
    assert perflow.Config(guidance_scale=2.5).guidance_scale == 2.5  # what the card says


def test_perflow_in_sync_drops_the_condition_for_the_teacher_too():
    """So the student learns the unconditional velocity, and can be guided as the teacher can."""
    value, seen = of_classes({"label_dropout": 0.5, "guidance_sync": True}, ROWS)
    assert value < 1e-12 and 200 < (seen == 2).sum() < 312 and torch.equal(seen[seen < 2], LABELS[seen < 2])


def test_perflow_out_of_sync_the_teacher_sees_the_class_that_the_student_does_not():
    guided = NULL + 2.5 * (MEANS - NULL)
    options = {"label_dropout": 0.5, "guidance_scale": 2.5}
    value, seen = of_classes(options, guided, LABELS)
    assert value < 1e-12 and 200 < (seen == 2).sum() < 312
    assert of_classes(options, torch.cat([guided, NULL[None]]))[0] > 1e-1
    assert (of_classes({}, ROWS)[1] == LABELS).all()  # nothing is dropped unasked


def test_label_dropout_without_classes_is_refused():
    made = perflow.Recipe(perflow.Config(label_dropout=0.1), TEACHER)
    with pytest.raises(InputError, match="label_dropout has no effect without classes; remove it, or give labelled"):
        made.networks(exact.Given(exact.Network(FIELD)))


# --- proreflow ---


def test_proreflow_without_direction_is_perflow():
    student = exact.Network(FIELD)
    for k in (1, 4):
        one = loss(proreflow, {"windows": k, "direction_weight": 0.0}, student, exact.batch(64)).total
        other = loss(perflow, {"windows": k, "solver_steps": 32 // k}, student, exact.batch(64)).total
        assert one.item() == other.item() > 1e-3


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_proreflow_loss_is_zero_at_the_straight_segments_and_adds_the_direction(weight):
    options = {"windows": 2, "direction_weight": weight, "times_per_window": 6}
    assert loss(proreflow, options, stepped(uniform_grid(2), "euler", 16), exact.batch(128)).total < 1e-12
    with_it, without = (
        loss(proreflow, {**options, "direction_weight": alpha}, exact.Network(FIELD), exact.batch(128))
        for alpha in (weight, 0.0)
    )
    direction = with_it.logs["direction"].item()
    assert direction > 1e-3 and with_it.total.item() == pytest.approx(without.total.item() + weight * direction)


def test_a_wrong_length_costs_nothing_in_direction():
    right = stepped(uniform_grid(4), "euler", 8)
    longer = exact.Network(lambda x, t, cond: 1.5 * right(x, t, cond))
    found = loss(proreflow, {"direction_weight": 1.0}, longer, exact.batch(64))
    assert found.logs["direction"] < 1e-12 and found.total > 0.1


def test_the_next_stage_has_the_same_targets_from_the_stage_before():
    """Eight windows, then four: two steps of the first student cross a window as the original teacher does."""
    x, t_s = randn("stage", 40, 3), torch.tensor([1.0, 0.75, 0.5, 0.25]).repeat(10)
    found = solvers.march(oracle(uniform_grid(8)), x, t_s, t_s - 0.25, {}, "euler", 2)
    exactly = x - 0.25 * exact.FLOW_MAP(x, t_s, t_s - 0.25, {})
    assert (found - exactly).abs().max() < 1e-8
    before = exact.teacher(oracle(uniform_grid(8)))
    options = {"windows": 4, "teacher_steps": 8}
    assert loss(proreflow, options, oracle(uniform_grid(4)), exact.batch(64), teacher=before).total < 1e-12


@pytest.mark.parametrize("module", [proreflow, rectified_diffusion])
def test_guidance_is_the_teachers(module):
    guided, classes = NULL + 2.5 * (MEANS - NULL), class_gaussian_teacher(MEANS, NULL, STD)
    options = {"guidance_scale": 2.5} if module is proreflow else {"guidance_scale": 2.5, "form": "phased"}
    steps = 8 if module is proreflow else 10

    def at(rows):
        student = stepped(uniform_grid(4), "euler", steps, lambda cond: rows[cond["class_labels"]])
        return loss(module, options, student, LABELLED, teacher=classes, classes=2).total

    assert at(guided) < 1e-12 and at(MEANS) > 1e-3


@pytest.mark.parametrize("options", [{}, {"form": "phased"}])
def test_the_square_of_the_velocitys_error_has_the_weight_of_the_step_to_the_end(options):
    """Under l2: (t - t_e)^2 ||v - v*||^2, with v* the velocity of the straight line."""
    borders = uniform_grid(4 if options else 1)
    right = stepped(borders, "euler", 10) if options else exact.STRAIGHT
    error = 0.3 * randn("error", 64, 3)
    wrong = exact.Network(lambda x_t, t, cond: right(x_t, t, cond) + error)
    batch = exact.batch(64)
    if not options:
        noise = randn("pairs", 64, 3)
        batch = Batch(None, Pairs(noise, MEAN + STD * noise), {})
    u = 0.3
    t_e = window(torch.tensor([u]), borders)[1].item()
    found = loss(
        rectified_diffusion, {**options, "distance": "l2"}, wrong, batch, exact.context(64, uniforms={"t": u})
    ).total
    assert found.item() == pytest.approx(((u - t_e) ** 2 * error.square().mean()).item(), rel=1e-6)


# --- seqrf ---


@pytest.mark.parametrize("batch", [trajectories(200), segments(200)], ids=["trajectories", "segments"])
@pytest.mark.parametrize("times_per_segment", [None, 1, 3])
def test_seqrf_loss_is_zero_at_the_straight_segments_only(batch, times_per_segment):
    options = {"times_per_segment": times_per_segment}
    assert loss(seqrf, options, oracle(uniform_grid(4)), batch).total < 1e-12
    assert loss(seqrf, options, exact.Network(FIELD), batch).total > 1e-3


@pytest.mark.parametrize("u", [0.0, 0.25, 0.9])
def test_seqrf_regresses_to_the_straight_segments(u):
    """The draw 0.3 is the second segment of four, from 0.75."""
    found = fit(seqrf, {}, trajectories(64), u)
    assert (found - coefficients(oracle(uniform_grid(4)), 0.75 - 0.25 * u)).abs().max() < 1e-6


def test_seqrf_takes_all_segments_alike_and_begins_where_they_begin():
    seen, count = {}, 6000
    student = exact.Network(lambda x, t, cond: seen.update(t=t, x=x) or FIELD(x, t, cond))
    batch = trajectories(count, (1.0, 0.9, 0.5, 0.0))
    loss(seqrf, {}, student, batch)
    counts = torch.histogram(seen["t"].double(), torch.tensor([0, 0.5, 0.9, 1.0]).double())[0]
    assert (counts - count / 3).abs().max() < 4 * math.sqrt(count / 3)
    loss(seqrf, {"times_per_segment": 1}, student, batch)
    times, rows = seen["t"].unique(), torch.arange(count)
    assert torch.equal(times, torch.tensor([0.5, 0.9, 1.0]))
    k = (batch.pairs.times == seen["t"][:, None]).long().argmax(1)
    assert torch.equal(seen["x"], batch.pairs.states[rows, k])  # to the bit: what sampling begins with


def test_more_segments_leave_less_of_the_error_of_a_bent_student():
    noise, sequential = randn("error", 64, 3), seqrf.Recipe(seqrf.Config(), TEACHER)
    errors = []
    for k in (1, 2, 4, 8, 16):
        grid = torch.tensor(sequential.t_grids(uniform_grid(k).tolist())[k], dtype=torch.float64)
        errors.append((euler.sample(FIELD, noise, grid, {}) - (MEAN + STD * noise)).square().mean().item())
    assert all(more > less for more, less in pairwise(errors))


# --- rectified diffusion ---


def stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return vp((1 - betas).cumprod(0))


class EpsilonField:
    """A VP network that predicts eps: exactly that of the pairs (noise, MEAN + STD noise)."""

    interpolant, t_range = stable_diffusion(), (0.0, 1.0)

    def eps(self, x, t):
        c = Coefficients(*(like(each, x) for each in self.interpolant.path(t.double())))
        return (x - c.alpha * MEAN) / (c.alpha * STD + c.sigma)

    def __call__(self, x, t, cond):
        return self.interpolant.convert(x, self.eps(x, t), t, "epsilon", "velocity")


@pytest.mark.parametrize("n", [999, 500, 20])
def test_one_ddim_step_of_the_rectified_eps_is_the_teachers_map(n):  # T11
    noise, t = randn("ddim", 40, 3), torch.full((40,), n / 999, dtype=torch.float64)
    field, target = EpsilonField(), MEAN + STD * randn("ddim", 40, 3)
    x_n = field.interpolant.mix(target, noise, t)
    assert (field.eps(x_n, t) - noise).abs().max() < 1e-10  # the optimum is the noise itself
    data, _ = field.interpolant.split(x_n, field.eps(x_n, t), t, "epsilon")
    assert (data - target).abs().max() < 1e-6


def test_the_eps_form_of_vp_is_the_straight_field_of_the_linear_path():
    """Converted by the change of schedule it is v2, and has no loss on pairs in the recipe."""
    rescheduled, straight = Rescheduled(EpsilonField(), linear()), oracle(uniform_grid(1))
    low, high = rescheduled.t_range
    x, t = randn("v2", 64, 3), torch.linspace(low, high, 64, dtype=torch.float64)
    assert (rescheduled(x, t, {}) - straight(x, t, {})).abs().max() < 1e-6
    batch, schedule = trajectories(64), stable_diffusion()
    for n in (999, 500, 20):  # T11
        u = linear().time_of(schedule.ratio(torch.tensor([n / 999], dtype=torch.float64)))
        ctx = exact.context(64, uniforms={"t": u.item()})
        assert loss(rectified_diffusion, {}, exact.Network(rescheduled), batch, ctx).total < 1e-12
        assert loss(rectified_diffusion, {}, exact.Network(FIELD), batch, ctx).total > 1e-2


@pytest.mark.parametrize("options", [{}, {"distance": "l2"}, {"huber_c": 0.1}])
def test_full_rectified_diffusion_has_reflows_optimum(options):
    batch = trajectories(128)
    assert loss(rectified_diffusion, options, oracle(uniform_grid(1)), batch).total < 1e-12
    assert loss(rectified_diffusion, options, exact.Network(FIELD), batch).total > 1e-3
    found = fit(rectified_diffusion, {"distance": "l2"}, trajectories(64), 0.4)
    assert (found - coefficients(oracle(uniform_grid(1)), 0.4)).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"huber_c": 0.1}, {"distance": "l2"}])
def test_rectified_diffusion_compares_data(options):
    """The authors' loss: data by the student's eps against the data of the pair."""
    batch, t = trajectories(64), 0.3
    found = loss(rectified_diffusion, options, exact.Network(FIELD), batch, exact.context(64, uniforms={"t": t})).total
    x_t = linear().mix(batch.pairs.data, batch.pairs.noise, torch.full((64,), t))
    eps = x_t + (1 - t) * FIELD(x_t, torch.full((64,), t), {})
    data = (x_t - t * eps) / (1 - t)
    huber = distances.pseudo_huber_elementwise(data, batch.pairs.data, options.get("huber_c", 1e-3))
    expected = distances.mse(data, batch.pairs.data) if "distance" in options else huber
    assert found.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_line_of_a_phase_is_ddims_in_any_schedule():  # T13
    """In VP, with the mean slope eps* of the teacher's steps: every point predicts the phase's end."""
    path, (n_s, n_e) = stable_diffusion(), (749, 499)
    x_s, x_e = randn("x_s", 8, 3), randn("x_e", 8, 3)  # any end: eps* is what leads there

    def at(n):
        c = path.path(torch.full((8,), n / 999, dtype=torch.float64))
        return (like(c.alpha, x_s), like(c.sigma, x_s)), c.sigma / c.alpha

    ((a_s, s_s), ratio_s), ((a_e, s_e), ratio_e) = at(n_s), at(n_e)
    eps = (x_e / a_e - x_s / a_s) / like(ratio_e - ratio_s, x_s)
    start, end = x_s / (a_s + s_s), x_e / (a_e + s_e)
    line = windows.Segment(start, end, *(ratio / (1 + ratio) for ratio in (ratio_s, ratio_e)))
    for n in range(n_e + 1, n_s + 1, 31):
        (a, s), ratio = at(n)
        x_n = a * (x_s / a_s + like(ratio - ratio_s, x_s) * eps)
        assert (a_e * (x_n / a + like(ratio_e - ratio, x_s) * eps) - x_e).abs().max() < 1e-8
        t = ratio / (1 + ratio)
        assert (line.at(t) - x_n / (a + s)).abs().max() < 1e-10
        assert (line.at(t) + like(1 - t, x_n) * line.velocity - eps).abs().max() < 1e-8  # the eps of its velocity
    one_step = solvers.integrate("euler", FIELD, start, torch.tensor([0.5, 0.2], dtype=torch.float64), {})
    segment = windows.Segment(start, one_step, torch.full((8,), 0.5), torch.full((8,), 0.2))
    assert torch.allclose(segment.velocity, FIELD(start, segment.t_s, {}), atol=1e-6)  # eps* = eps of the teacher


@pytest.mark.parametrize("options", [{}, {"phases": 2, "solver_steps": 3}, {"times": "grid"}, {"distance": "l2"}])
def test_phased_rectified_diffusion_loss_is_zero_at_the_straight_segments_only(options):
    right = stepped(uniform_grid(options.get("phases", 4)), "euler", options.get("solver_steps", 10))
    given = {**options, "form": "phased"}
    assert loss(rectified_diffusion, given, right, exact.batch(256)).total < 1e-12
    assert loss(rectified_diffusion, given, exact.Network(FIELD), exact.batch(256)).total > 1e-5


def test_phased_rectified_diffusion_trains_at_the_times_of_the_teachers_steps():
    seen = {}
    student = exact.Network(lambda x, t, cond: seen.update(t=t) or FIELD(x, t, cond))
    loss(rectified_diffusion, {"form": "phased", "times": "grid", "phases": 2}, student, exact.batch(4000))
    assert torch.allclose(seen["t"].unique(), torch.arange(1, 21) / 20)


# --- all ---


def test_what_real_data_is_noised_to_is_where_the_window_begins():
    t, data, noise = torch.tensor([1.0, 0.6, 0.5, 0.1]), randn("data", 4, 3), randn("its noise", 4, 3)
    found = windows.solve(FIELD, data, noise, t, {}, borders=uniform_grid(2), solver="heun", steps=64)
    assert found.t_s.tolist() == [1, 1, 0.5, 0.5] and found.t_e.tolist() == [0.5, 0.5, 0, 0]
    assert torch.equal(found.start[:2], noise[:2]) and torch.equal(found.start[2:], (data[2:] + noise[2:]) / 2)
    exactly = found.start - 0.5 * exact.FLOW_MAP(found.start, found.t_s, found.t_e, {})
    assert (found.end - exactly).abs().max() < 1e-3
    assert torch.equal(found.at(found.t_s), found.start) and (found.at(found.t_e) - found.end).abs().max() < 1e-15


@pytest.mark.parametrize(("module", "options"), ONLINE)
def test_no_gradient_goes_through_the_teacher(module, options):
    mean = nn.Parameter(MEAN.clone())
    teacher = exact.teacher(exact.Network(lambda x, t, cond: FIELD(x, t, cond) + mean))
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    student = exact.Network(lambda x, t, cond: weight * x)
    loss(module, options, student, exact.batch(8), teacher=teacher).total.backward()
    assert mean.grad is None and weight.grad.all()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (perflow, {"windows": 0}, "greater than 0"),
        (perflow, {"parameterisation": "eps"}, "'velocity', 'diff_eps' or 'ddim_eps'"),
        (perflow, {"times_per_window": 1, "parameterisation": "ddim_eps"}, "but ddim_eps has no weight at t = 1"),
        (
            perflow,
            {"guidance_sync": True, "guidance_scale": 2.0, "label_dropout": 0.1},
            "guidance_scale has no effect with guidance_sync: true; remove one of them",
        ),
        (perflow, {"guidance_sync": True}, "guidance_sync has no effect with label_dropout: 0; remove guidance_sync"),
        (proreflow, {"windows": 5}, "teacher_steps: 32 is not a multiple of windows: 5; nearest: 35"),
        (proreflow, {"direction_weight": -1.0}, "greater than or equal to 0"),
        (seqrf, {"windows": 2}, "Extra inputs are not permitted"),
        (
            rectified_diffusion,
            {"phases": 2, "guidance_scale": 2.0},
            "guidance_scale, phases: no effect with form: full; remove them, or use phased",
        ),
        (rectified_diffusion, {"times": "grid"}, "times: no effect with form: full"),
        (rectified_diffusion, {"distance": "l2", "huber_c": 0.1}, "huber_c has no effect with distance: l2; remove it"),
    ],
)
def test_options_without_effect_or_sense_are_refused(module, options, message):
    with pytest.raises(ValidationError) as caught:
        module.Config(**options)
    assert message in str(caught.value)


def test_what_they_need():
    assert perflow.Config().needs == proreflow.Config().needs == {"data", "teacher"}
    assert seqrf.Config().needs == {"teacher", "pairs", "states"}
    assert rectified_diffusion.Config().needs == {"teacher", "pairs"}
    assert rectified_diffusion.Config(form="phased").needs == {"teacher", "data"}


SUBJECTS = [
    testing.Subject(
        "reflow/perflow",
        {"windows": 2, "solver_steps": 2},
        ring={"times_per_window": 8, "solver_steps": 8},
        steps=(2,),
        short=testing.Training(192_000),
        long=testing.Training(1_100_000),
        closed_form=(
            lambda: test_one_euler_step_a_window_is_the_teachers_map(uniform_grid(4)),
            lambda: test_perflow_loss_is_zero_at_the_straight_segments_only("diff_eps", {}),
            lambda: test_the_eps_forms_decode_to_the_end_of_the_window_from_all_of_it("diff_eps"),
            lambda: test_perflow_with_one_window_is_reflow(0.25),
        ),
    ),
    testing.Subject(
        "reflow/proreflow",
        {"windows": 2, "teacher_steps": 4},
        ring={"times_per_window": 8, "teacher_steps": 16},
        steps=(2,),
        short=testing.Training(192_000),
        long=testing.Training(1_100_000),
        closed_form=(
            lambda: test_proreflow_loss_is_zero_at_the_straight_segments_and_adds_the_direction(0.1),
            test_proreflow_without_direction_is_perflow,
            test_the_next_stage_has_the_same_targets_from_the_stage_before,
        ),
    ),
    testing.Subject(
        "reflow/seqrf",
        ring={"times_per_segment": 4},
        steps=(2,),
        closed_form=(
            lambda: test_seqrf_loss_is_zero_at_the_straight_segments_only(trajectories(200), None),
            lambda: test_seqrf_regresses_to_the_straight_segments(0.25),
        ),
    ),
    testing.Subject(
        "reflow/rectified_diffusion",
        steps=(1, 2),
        closed_form=(
            lambda: test_full_rectified_diffusion_has_reflows_optimum({}),
            lambda: test_phased_rectified_diffusion_loss_is_zero_at_the_straight_segments_only({}),
            lambda: test_one_ddim_step_of_the_rectified_eps_is_the_teachers_map(500),
            test_the_line_of_a_phase_is_ddims_in_any_schedule,
        ),
    ),
]
