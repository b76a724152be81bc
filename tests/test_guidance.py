"""Guidance and epsilon scaling: closed forms on Gaussians, the formulas of diffusers' guiders, and counted calls."""

import dataclasses
import math

import pytest
import torch
from diffusers import guiders
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.core.errors import InputError
from distill.flow.draws import generator
from distill.flow.fields import Counted, Rescheduled, calls_per_sample
from distill.flow.guidance import Autoguided, Guided, Scaled, apg, cfg, combination, renormalised, rescaled, zero_star
from distill.flow.interpolants import edm, linear, vp
from distill.flow.solvers import integrate, invert, inverting_grid, on_linear_path, solve
from distill.flow.times import uniform_grid
from distill.protocols import VelocityField
from distill.solvers import Solver, find_solver, solver_names
from distill.spec import kinds, nfe
from distill.spec.guidancespec import UNCHANGED, FieldSettings, GuidanceSpec
from distill.students import sampling
from distill.teachers.analytic import GaussianField, MixtureField
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher

VARIANCE = 0.3
STD = math.sqrt(VARIANCE)
MEANS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
NULL = torch.tensor([-0.5, 1.0, 0.2], dtype=torch.float64)
WIDTHS = torch.full((3,), STD, dtype=torch.float64)
TEACHER = class_gaussian_teacher(MEANS, NULL, WIDTHS)
LABELS = {"class_labels": torch.tensor([0, 1, 1, 0, 1])}
FORMS = [
    GuidanceSpec(form="zero_star"),
    GuidanceSpec(form="apg"),
    GuidanceSpec(form="apg", norm_limit=0.5),
    GuidanceSpec(form="rescaled"),
    GuidanceSpec(form="renormalised"),
]
EDM_RANGE = (0.002 / 1.002, 80 / 81)


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("guidance", name), dtype=torch.float64)


def name_of(guidance):
    return " ".join([guidance.form or "cfg", *guidance.words[1:]])


def stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return vp((1 - betas).cumprod(0))


def on(interpolant, t_range=(0.0, 1.0)):
    """The classes of `TEACHER` on another path."""
    rows = torch.cat([MEANS, NULL[None]])
    field = GaussianField(rows, WIDTHS, interpolant, t_range, conditional=True)
    return dataclasses.replace(TEACHER, field=field)


def guided(guidance=None, scale=3.0, teacher=TEACHER):
    return teacher.field_with(FieldSettings(scale, guidance))


def rk4(field, x, t_from, t_to, steps, cond):
    """Classical Runge-Kutta from one time to another."""

    def v(x, t):
        return field(x, torch.full((len(x),), t, dtype=torch.float64), cond)

    h = (t_to - t_from) / steps
    for i in range(steps):
        t = t_from + i * h
        a = v(x, t)
        b = v(x + h / 2 * a, t + h / 2)
        c = v(x + h / 2 * b, t + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + v(x + h * c, t + h))
    return x


# --- intervals ---


@pytest.mark.parametrize(("interval", "share"), [((0.1, 0.6), 0.6370), ((0.3, 0.8), 0.6519), ((0.0, 0.5), 0.5196)])
def test_guidance_in_an_interval_moves_the_mean_by_a_known_share(interval, share):  # S09
    """m_c + (w - 1)(m_c - m_0)(A(low) - A(high)), with A(t) = std (1 - t)/q(t); the standard deviation is unchanged."""
    scale, (low, high) = 3.0, interval
    field = guided(GuidanceSpec(interval=interval), scale)
    z = torch.cat([torch.zeros(1, 3), torch.ones(1, 3)]).double()
    cond = {"class_labels": torch.tensor([0, 0])}
    over = 2e-6  # beyond the tolerance for rounding, so that no step sees both sides of an edge
    x = rk4(field, z, 1.0, high + over, 30, cond)
    x = rk4(field, x, high, low + over if low else 0.0, 30, cond)
    x = rk4(field, x, low, 0.0, 30, cond) if low else x
    mean, std = x[0], x[1] - x[0]
    found = (mean - MEANS[0]) / ((scale - 1) * (MEANS[0] - NULL))
    ends = [STD * (1 - t) / math.sqrt((1 - t) ** 2 * VARIANCE + t**2) for t in interval]
    assert found.tolist() == pytest.approx([ends[0] - ends[1]] * 3, abs=2e-5)
    assert found.tolist() == pytest.approx([share] * 3, abs=1e-4)
    assert std.tolist() == pytest.approx([STD] * 3, abs=2e-5)


def test_steps_that_begin_in_the_interval_are_guided():
    """On a grid with nodes at its ends, Euler guides for exactly the length of the interval; 0.6000001 is 0.6."""
    seen = []
    inner = exact.Network(lambda x_t, t, cond: seen.append((round(t[0].item(), 6), len(x_t))) or x_t)
    teacher = dataclasses.replace(TEACHER, field=inner)
    field = guided(GuidanceSpec(interval=(0.2, 0.6)), teacher=teacher)
    integrate("euler", field, torch.zeros(1, 3), uniform_grid(10) * (1 + 1e-7 * (uniform_grid(10) < 1)), {
        "class_labels": torch.tensor([0])
    })  # fmt: skip
    assert [t for t, rows in seen if rows == 2] == [0.6, 0.5, 0.4, 0.3]
    assert len(seen) == 10


def test_rows_inside_and_outside_share_one_call():
    counted = Counted(TEACHER.field)
    x, t = randn("mixed", 5, 3), torch.tensor([0.1, 0.3, 0.6, 0.9, 0.2], dtype=torch.float64)
    field = Guided(counted, TEACHER.null, 3.0, interval=(0.2, 0.6))
    v = field(x, t, LABELS)
    assert (counted.calls, counted.rows) == (1, 7), "only the rows at 0.3 and 0.6 are called twice"
    plain, all_guided = TEACHER.field(x, t, LABELS), TEACHER.guided(3.0)(x, t, LABELS)
    inside = torch.tensor([False, True, True, False, False])[:, None]
    assert torch.equal(v, torch.where(inside, all_guided, plain))
    counted.calls = counted.rows = 0
    outside = torch.full((5,), 0.7)
    assert torch.equal(field(x, outside, LABELS), TEACHER.field(x, outside, LABELS))
    assert (counted.calls, counted.rows) == (1, 5)
    assert [calls_per_sample(field, each) for each in (t, outside)] == [2, 1]
    zero = torch.zeros(5)
    assert torch.equal(guided(GuidanceSpec(interval=(0.0, 0.6)))(x, zero, LABELS), TEACHER.guided(3.0)(x, zero, LABELS))


@pytest.mark.parametrize("name", solver_names())
@pytest.mark.parametrize("weak", [False, True])
def test_counted_calls_are_the_calls_that_are_made(name, weak):  # S08
    vp_teacher = on(stable_diffusion())
    settings = FieldSettings(2.0, GuidanceSpec(interval=(0.25, 0.7), weak="w" if weak else None))
    for teacher in (TEACHER, vp_teacher, on(edm(), EDM_RANGE)):
        inner, worse = Counted(teacher.field), Counted(teacher.field)
        whole = dataclasses.replace(teacher, field=inner, weak=dataclasses.replace(teacher, field=worse))
        for steps in (find_solver(name).least_steps, find_solver(name).least_steps + 3, 9):
            counted = Counted(whole.field_with(settings))
            inner.rows = worse.rows = 0
            x, noises = torch.zeros(2, 3), find_solver(name).noises
            fresh = [x] * (noises(steps) if noises else 0)
            solve(counted, x, {"class_labels": torch.tensor([0, 1])}, solver=name, steps=steps, fresh=fresh)
            said = sampling.of_teacher(whole, name, steps, settings).nfe
            assert counted.calls == said == (inner.rows + worse.rows) / 2
            assert find_solver(name).calls(steps) <= said < 2 * find_solver(name).calls(steps) or steps == 1
            assert sampling.of_teacher(whole, name, steps, FieldSettings(2.0)).nfe == 2 * find_solver(name).calls(steps)
    if find_solver(name).noises is not None:
        return  # only along uniform times
    along = [1.0, 0.7, 0.3, 0.0]
    counted = Counted(guided(settings.guidance if not weak else GuidanceSpec(interval=(0.25, 0.7))))
    method = sampling.of_teacher(TEACHER, name, 3, dataclasses.replace(settings, guidance=GuidanceSpec(
        interval=(0.25, 0.7))), along)  # fmt: skip
    integrate(name, counted, torch.zeros(2, 3), torch.tensor(along), {"class_labels": torch.tensor([0, 1])})
    assert counted.calls == method.nfe


@pytest.mark.parametrize("name", kinds.inverting_solvers())
def test_counted_calls_of_an_inversion(name):
    field = guided(GuidanceSpec(interval=(0.2, 0.6)), teacher=on(edm(), EDM_RANGE))
    counted, x = Counted(field), torch.zeros(2, 3)
    invert(counted, x, {"class_labels": torch.tensor([0, 1])}, solver=name, steps=6, noise=x)
    settings = FieldSettings(3.0, GuidanceSpec(interval=(0.2, 0.6)))
    assert counted.calls == settings.network_calls(name, inverting_grid(field, 6))
    assert settings.network_calls(name, [0.0, 0.5, 1.0]) > 2, "0.5 is guided"
    assert FieldSettings(3.0).network_calls(name, [0.0, 0.5, 1.0]) == 2 * find_solver(name).calls_inverting(2)


def test_a_solver_that_cannot_run_on_numbers_is_named(monkeypatch):
    euler = find_solver("euler")
    other = Solver(
        ORDER=1, IS_REFERENCE=False, calls=euler.calls, calls_inverting=None, look=euler.look,
        step=lambda ode, x, seen, at: x.add(seen),
    )  # fmt: skip
    monkeypatch.setattr(nfe, "find_solver", lambda name: other)
    with pytest.raises(
        InputError, match=r"solver 'euler' cannot be used with guidance.interval: to count its network calls, its step"
    ):
        nfe.times_of_calls("euler", [1.0, 0.0])


# --- forms ---


def test_apg_identities():  # S10
    x, t, v, other = (randn(name, 5, 3) if name != "t" else torch.rand(5).double() for name in ("x", "t", "v", "o"))
    time = t[:, None]
    data, other_data = x - time * v, x - time * other
    found = x - time * apg(x, t, v, other, 3.0)  # data prediction of the guided velocity
    assert ((found - data) * data).sum(1).abs().max() < 1e-12, "the change is orthogonal to the data prediction"
    along = data * (1 + randn("along", 5, 1))
    assert torch.allclose(apg(x, t, v, v + (data - along) / time, 3.0), v, atol=1e-12), "nothing is left of a multiple"
    across = other_data - data
    across = data + across - (across * data).sum(1, keepdim=True) / data.square().sum(1, keepdim=True) * data
    usual = cfg(x, t, v, (x - across) / time, 3.0)
    assert torch.allclose(apg(x, t, v, (x - across) / time, 3.0), usual, atol=1e-12), "an orthogonal one is as usual"
    assert torch.equal(apg(x, t, v, other, 3.0, norm_limit=1e6), apg(x, t, v, other, 3.0))
    short = x - time * apg(x, t, v, (x - across) / time, 3.0, norm_limit=1e-3)
    assert (short - data).norm(dim=1).tolist() == pytest.approx([2e-3] * 5), "(w - 1) times the limit"
    assert apg(x, 0 * t, v, other, 3.0, norm_limit=1e-3).isfinite().all(), "no division by t"


def test_zero_star_identities():  # S10
    x, t, v, other = randn("x", 5, 3), torch.full((5,), 0.5), randn("v", 5, 3), randn("o", 5, 3)
    factor = randn("factor", 5, 1)
    assert torch.allclose(zero_star(x, t, v, factor * v, 7.0), v, atol=1e-7), "a parallel velocity changes nothing"
    s = (v * other).sum(1, keepdim=True) / other.square().sum(1, keepdim=True)
    for change in (-0.01, 0.01):
        assert ((v - s * other).norm(dim=1) < (v - (s + change) * other).norm(dim=1)).all(), "s is the best fit"
    fits = other + (v - s * other)  # its best fit is s = 1
    assert torch.allclose(zero_star(x, t, fits, other, 3.0), cfg(x, t, fits, other, 3.0), atol=1e-7)


@pytest.mark.parametrize("guidance", FORMS, ids=name_of)
def test_scale_one_gives_the_velocity_with_condition(guidance):
    x, t, v, other = randn("x", 5, 3), torch.full((5,), 0.5), randn("v", 5, 3), randn("o", 5, 3)
    assert torch.allclose(combination(guidance)(x, t, v, other, 1.0), v, atol=1e-12)


def test_norms_and_standard_deviations_are_those_with_condition():
    x, t, v, other = randn("x", 5, 2, 2, 2), torch.full((5,), 0.5), randn("v", 5, 2, 2, 2), randn("o", 5, 2, 2, 2)
    usual = cfg(x, t, v, other, 7.0)
    found, each = renormalised(x, t, v, other, 7.0), v.flatten(1).norm(dim=1)
    assert torch.allclose(found.flatten(1).norm(dim=1), each)
    assert torch.allclose(found / found.flatten(1).norm(dim=1)[:, None, None, None], usual / usual.flatten(1).norm(
        dim=1)[:, None, None, None])  # fmt: skip
    found = rescaled(x, t, v, other, 7.0, share=1.0)
    assert torch.allclose(found.flatten(1).std(dim=1), v.flatten(1).std(dim=1))
    assert torch.allclose(rescaled(x, t, v, other, 7.0, share=0.25), 0.25 * found + 0.75 * usual)


# --- diffusers' guiders ---


def stock(guidance, scale):
    """(velocity with condition, without it, x, t) -> guided velocity, by diffusers."""
    match guidance.form:
        case "cfg" | None:
            made = guiders.ClassifierFreeGuidance(guidance_scale=scale)
        case "rescaled":
            made = guiders.ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=guidance.rescale or 0.7)
        case "zero_star":
            made = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=scale, zero_init_steps=0)
        case "apg":
            made = guiders.AdaptiveProjectedGuidance(
                guidance_scale=scale - 1,
                adaptive_projected_guidance_rescale=guidance.norm_limit or 0.0,
                eta=0.0,
                use_original_formulation=True,
            )
        case "renormalised":  # pipelines of Qwen-Image and Lumina 2 on one token

            def renormalise(v, other, x, t):
                both = other + scale * (v - other)
                return both * (v.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))

            return renormalise
    made.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(1))
    if guidance.form != "apg":
        return lambda v, other, x, t: made.forward(v, other).pred

    def in_data(v, other, x, t):
        return (x - made.forward(x - t * v, x - t * other).pred) / t

    return in_data


@pytest.mark.parametrize(
    "guidance", [None, *FORMS, GuidanceSpec(form="rescaled", rescale=0.3)], ids=lambda g: g and name_of(g)
)
def test_samples_are_those_of_diffusers_guiders(guidance):
    """Ten Euler steps on the class mixture, with diffusers' formula and with the field."""
    means = torch.cat([MEANS, -MEANS[:1]])
    field = MixtureField(means, 0.4, conditional=True)
    teacher = dataclasses.replace(TEACHER, field=field, num_classes=3, null_class=3)
    combined, x = stock(guidance or GuidanceSpec(), 4.0), randn("stock", 5, 3)
    found = solve(guided(guidance, 4.0, teacher), x, LABELS, solver="euler", steps=10)
    for t in uniform_grid(10)[:-1].tolist():
        times = torch.full((5,), t, dtype=torch.float64)
        v, other = field(x, times, LABELS), field(x, times, teacher.null(LABELS))
        x = x - 0.1 * combined(v, other, x, t)
    assert (found - x).abs().max() < 1e-6
    usual = solve(guided(None, 4.0, teacher), randn("stock", 5, 3), LABELS, solver="euler", steps=10)
    assert guidance is None or (found - usual).abs().max() > 1e-2, "it is another form"


def test_autoguidance_is_that_of_diffusers():
    guider = guiders.AutoGuidance(guidance_scale=2.0, auto_guidance_layers=[0], dropout=1.0)
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(1))
    good, bad = GaussianField(NULL, WIDTHS), GaussianField(NULL, 2 * WIDTHS)
    x, t = randn("auto", 5, 3), torch.full((5,), 0.4)
    assert torch.allclose(Autoguided(good, bad, 2.0)(x, t, {}), guider.forward(good(x, t, {}), bad(x, t, {})).pred)


# --- paths, precision ---


@pytest.mark.parametrize("guidance", [GuidanceSpec(interval=(0.2, 0.6)), *FORMS], ids=name_of)
@pytest.mark.parametrize("path", ["vp", "edm"])
def test_guidance_is_the_same_on_every_path(guidance, path):
    teacher = on(stable_diffusion()) if path == "vp" else on(edm(), EDM_RANGE)
    field, reference = guided(guidance, teacher=teacher), guided(guidance)
    assert field.interpolant is linear()
    assert field.t_range == Rescheduled(teacher.field, linear()).t_range
    x, t = randn("path", 5, 3), torch.tensor([0.15, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    assert (field(x, t, LABELS) - reference(x, t, LABELS)).abs().max() < 1e-9
    plain = teacher.guided(3.0)
    assert plain.interpolant is teacher.field.interpolant, "classifier-free guidance needs no other path"


@pytest.mark.parametrize("guidance", [None, *FORMS], ids=lambda g: g and name_of(g))
def test_low_precision_stays_and_is_as_exact_as_its_inputs(guidance):
    interval = (guidance or GuidanceSpec()).model_copy(update={"interval": (0.2, 0.9)})
    x, t = randn("low", 5, 3), torch.tensor([0.15, 0.3, 0.5, 0.7, 0.95])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        exact_v = guided(interval)(x, t.double(), LABELS)
        v = guided(interval)(x.to(dtype), t, LABELS)
        assert v.dtype == dtype and (v.double() - exact_v).abs().max() < tolerance * exact_v.abs().max()
    good, bad = GaussianField(NULL, WIDTHS), GaussianField(NULL, 2 * WIDTHS)
    assert Autoguided(good, bad, 2.0, (0.2, 0.9))(x.bfloat16(), t, {}).dtype == torch.bfloat16
    scaled = Scaled(GaussianField(NULL, WIDTHS, t_range=(0.0, 0.99)), 1.01)
    assert scaled(x.bfloat16(), t, {}).dtype == torch.bfloat16


# --- autoguidance ---


def test_autoguidance_of_gaussians_has_the_known_spread():  # S09
    """std = bad_variance^((1 - w)/2) good_variance^(w/2); the mean is that of both."""
    one = torch.ones(1, dtype=torch.float64)
    good, bad = GaussianField(0.7 * one, one * STD), GaussianField(0.7 * one, one * math.sqrt(0.6))
    field = Autoguided(good, bad, 2.0)
    x = rk4(field, torch.tensor([[0.0], [1.0]], dtype=torch.float64), 1.0, 0.0, 60, {})
    assert x[0].item() == pytest.approx(0.7, abs=1e-6)
    assert (x[1] - x[0]).item() == pytest.approx(0.387298, abs=1e-6)
    assert torch.equal(Autoguided(good, bad, 1.0)(x, one.expand(2) / 2, {}), good(x, one.expand(2) / 2, {}))
    mixed = Autoguided(good, bad, 2.0, (0.2, 0.6))(x, torch.tensor([0.3, 0.7]), {})
    assert mixed[1] == good(x, torch.tensor([0.3, 0.7]), {})[1]
    assert mixed[0] == field(x, torch.tensor([0.3, 0.7]), {})[0]


def test_a_weak_model_must_fit():
    settings = FieldSettings(2.0, GuidanceSpec(weak="w"))
    two = class_gaussian_teacher(MEANS[:, :2], NULL[:2], WIDTHS[:2])
    with pytest.raises(
        InputError,
        match=r"the weak model \(.*\) makes samples of shape \[2\] with 2 classes, but the teacher \(.*\) makes "
        r"samples of shape \[3\] with 2 classes; use a weak model of the same data",
    ):
        dataclasses.replace(TEACHER, weak=two).field_with(settings)
    with pytest.raises(
        InputError,
        match=r"the weak model is defined at times 0.001996 to 0.9877 of the linear path, but the teacher at 0",
    ):
        dataclasses.replace(TEACHER, weak=on(edm(), EDM_RANGE)).field_with(settings)
    short = dataclasses.replace(on(edm(), EDM_RANGE), weak=TEACHER)
    assert short.field_with(settings).t_range == on_linear_path(short.field).t_range
    unknown = dataclasses.replace(TEACHER, null_class=None, weak=TEACHER)
    assert isinstance(unknown.field_with(settings), VelocityField), "it needs no unconditional prediction"


# --- epsilon scaling ---


def karras_ratios(steps):
    most, least = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [*(torch.linspace(most, least, steps, dtype=torch.float64) ** 7).tolist(), 0.0]


@pytest.mark.parametrize(("kappa", "of_exact"), [(1.0, 0.84791), (1.0048, 0.87416)])
def test_epsilon_scaling_with_ddim_is_the_product(kappa, of_exact):  # S11
    one = torch.ones(1, dtype=torch.float64)
    inner = GaussianField(0 * one, STD * one, edm(), (0.0, 80 / 81))
    field = Scaled(inner, kappa)
    ratios = karras_ratios(18)
    grid = torch.tensor([r / (1 + r) for r in ratios], dtype=torch.float64)
    start = torch.tensor([[1.0]], dtype=torch.float64) / (1 + 80)  # x/alpha is 1
    x = integrate("euler", on_linear_path(field), start, grid, {})
    steps = zip(ratios[:-1], ratios[1:], strict=True)
    expected = math.prod(1 + (s - r) * r / (kappa * (VARIANCE + r**2)) for r, s in steps)
    assert x.item() == pytest.approx(expected, rel=1e-12)
    assert x.item() / math.sqrt(VARIANCE / (VARIANCE + 80**2)) == pytest.approx(of_exact, abs=1e-5)


@pytest.mark.parametrize(("kappa", "factor"), [(1.0048, 1.0488), (1.017, 1.1813)])
def test_epsilon_scaling_widens_an_exact_field_by_a_power_law(kappa, factor):  # S11
    one = torch.ones(1, dtype=torch.float64)
    field = on_linear_path(Scaled(GaussianField(0 * one, STD * one, edm(), (0.0, 80 / 81)), kappa))
    ratios = (torch.linspace(math.log(80), math.log(1e-3), 200, dtype=torch.float64)).exp().tolist()
    grid = torch.tensor([r / (1 + r) for r in [*ratios, 0.0]], dtype=torch.float64)
    x = integrate("heun", field, torch.ones(1, 1, dtype=torch.float64) / 81, grid, {})
    variance = x.item() ** 2 / (VARIANCE / (VARIANCE + 80**2))
    assert variance == pytest.approx(((VARIANCE + 80**2) / VARIANCE) ** (1 - 1 / kappa), rel=2e-3)
    assert variance == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("path", ["vp", "edm", "linear"])
def test_epsilon_scaling_divides_the_noise_prediction(path):
    interpolant, t_range = {
        "vp": (stable_diffusion(), (0.0, 1.0)),
        "edm": (edm(), EDM_RANGE),
        "linear": (linear(), (0.0, 0.99)),
    }[path]
    teacher = on(interpolant, t_range)
    field, plain = teacher.field_with(FieldSettings(epsilon_scale=1.02)), on_linear_path(teacher.field)
    x, t = randn("scaled", 5, 3), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    data, noise = linear().split(x, field(x, t, LABELS), t)
    assert torch.allclose(noise, linear().split(x, plain(x, t, LABELS), t)[1] / 1.02, atol=1e-10)
    assert torch.allclose(linear().mix(data, noise, t), x, atol=1e-12)
    own = torch.full((5,), 0.5, dtype=torch.float64)
    assert torch.equal(Scaled(teacher.field, 1.0)(x, own, LABELS), teacher.field(x, own, LABELS))
    assert teacher.field_with(UNCHANGED) is teacher.field
    both = teacher.field_with(FieldSettings(2.0, None, 1.02))
    assert calls_per_sample(both, t) == 2 and both.t_range == plain.t_range


def test_epsilon_scaling_to_pure_noise_is_refused():
    with pytest.raises(
        InputError,
        match=r"epsilon_scale: 1.005 given, but the teacher is defined up to pure noise \(t = 1\), where the scaled "
        "velocity is infinite; use 1, or a teacher whose schedule ends before pure noise",
    ):
        TEACHER.field_with(FieldSettings(epsilon_scale=1.005))
    with pytest.raises(InputError, match="epsilon_scale: 1.005 given"):
        zero_terminal = vp(torch.tensor([0.99, 0.5, 0.0]))
        on(zero_terminal).field_with(FieldSettings(epsilon_scale=1.005))
    assert Scaled(TEACHER.field, 1.0).t_range == (0.0, 1.0)


def test_single_numbers_cannot_be_rescaled():
    one = class_gaussian_teacher(MEANS[:, :1], NULL[:1], WIDTHS[:1])
    with pytest.raises(
        InputError, match="makes single numbers, which have no standard deviation; guidance of form: res"
    ):
        one.field_with(FieldSettings(2.0, GuidanceSpec(form="rescaled")))
    without = dataclasses.replace(TEACHER, null_class=None)
    with pytest.raises(InputError, match="has no class id for the unconditional call, which guidance needs"):
        without.field_with(FieldSettings(2.0, GuidanceSpec(form="apg")))


@pytest.mark.parametrize("guidance", [*FORMS, GuidanceSpec(weak="w")], ids=name_of)
def test_recipes_guide_within_an_interval_without_waiting_for_the_device(guidance):
    """The velocities are those of sampling, at all times in one batch, also with a scale for each sample."""
    weak = dataclasses.replace(TEACHER, field=class_gaussian_teacher(MEANS + 0.3, NULL, 1.5 * WIDTHS).field)
    form = guidance.model_copy(update={"interval": (0.2, 0.6)})
    teacher = dataclasses.replace(TEACHER, form=form, weak=weak)
    x, t = randn("trained", 5, 3), torch.tensor([0.1, 0.3, 0.6, 0.61, 1.0])
    scales = {"guidance_scale": torch.full((5,), 3.0)}
    expected = teacher.field_with(FieldSettings(3.0, form))(x, t, LABELS)
    for found in (teacher.guided(3.0)(x, t, LABELS), teacher.guided((2.0, 4.0))(x, t, {**LABELS, **scales})):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    plain = teacher.field(x, t, LABELS)
    assert ((found - plain).abs().amax(1) > 1e-3).tolist() == [False, True, True, False, False]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a number of rows that depends on values raises there
        given = [mode.from_tensor(each) for each in (x, t, LABELS["class_labels"])]
        teacher.guided(3.0)(*given[:2], {"class_labels": given[2]})
