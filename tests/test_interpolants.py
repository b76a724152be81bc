"""Interpolants: derivatives, conversions and maps, and that times of another shape than [B] are refused."""

import math

import pytest
import torch

from distill.flow.draws import generator
from distill.flow.interpolants import edm, like, linear, vp
from distill.testing.closed_form import trig

KINDS = ["sample", "epsilon", "v_prediction", "velocity"]


def scaled_linear(count=1000):
    """Stable Diffusion's schedule: sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


PATHS = [linear(), vp(scaled_linear()), edm(), trig(), trig(0.5)]
IDS = ["linear", "vp", "edm", "trig", "trig-0.5"]


def points(name, count=100, shape=(3, 4, 4)):
    g = generator("interpolants", name)
    data, noise = (torch.randn(count, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    return data, noise, 0.01 + 0.98 * torch.rand(count, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_gives_back_data_and_noise(path, kind):  # T01
    data, noise, t = points(path.name)
    x_t = path.mix(data, noise, t)
    got_data, got_noise = path.split(x_t, path.predict(data, noise, t, kind), t, kind)
    assert (got_data - data).abs().max() < 1e-9
    assert (got_noise - noise).abs().max() < 1e-9


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_conversions_among_all_kinds_go_round(path):  # T01
    data, noise, t = points(path.name)
    x_t = path.mix(data, noise, t)
    for a in KINDS:
        for b in KINDS:
            converted = path.convert(x_t, path.predict(data, noise, t, a), t, a, b)
            expected = path.predict(data, noise, t, b)
            assert ((converted - expected).abs() / (1 + expected.abs())).max() < 1e-9, (a, b)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_velocity_is_the_derivative_of_the_path(path):
    data, noise, t = points(path.name)
    if path.name == "vp":  # piecewise smooth: stay within the pieces
        t = ((t * 999).floor() + 0.5) / 999
    h = 1e-6
    slope = (path.mix(data, noise, t + h) - path.mix(data, noise, t - h)) / (2 * h)
    v = path.velocity(data, noise, t)
    assert ((slope - v).abs() / (1 + v.abs())).max() < 1e-6


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_of_inverts_the_ratio(path, dtype):
    t = torch.linspace(0, 0.999, 1001, dtype=dtype)
    back = path.time_of(path.ratio(t))
    assert back.dtype == dtype
    assert (back - t).abs().max() < (1e-6 if dtype is torch.float64 else 1e-4)


def test_time_of_knows_both_ends():
    for path in (linear(), edm(), trig(), trig(0.5), vp(scaled_linear())):
        ends = path.time_of(torch.tensor([0.0, math.inf], dtype=torch.float64))
        assert ends.tolist() == [0.0, 1.0], path.name


def test_the_linear_path_is_the_plain_formulas():
    data, noise, t = points("plain")
    path, x_t = linear(), (1 - like(t, data)) * data + like(t, data) * noise
    assert torch.equal(path.mix(data, noise, t), x_t)
    v = path.velocity(data, noise, t)
    assert torch.equal(v, noise - data)
    got_data, got_noise = path.split(x_t, v, t)
    assert (got_data - (x_t - like(t, x_t) * v)).abs().max() < 1e-12
    assert (got_noise - (x_t + (1 - like(t, x_t)) * v)).abs().max() < 1e-12


def test_stable_diffusion_has_the_numbers_of_the_sheet():  # reflow 0.3
    cumulative = scaled_linear()
    path = vp(cumulative)
    ends = path.ratio(torch.tensor([0.0, 1.0], dtype=torch.float64))
    t_min, t_max = linear().time_of(ends).tolist()
    assert cumulative[-1].item() == pytest.approx(0.0046601, abs=5e-8)
    assert ends[1].item() == pytest.approx(14.6146, abs=5e-5)
    assert (t_min, t_max) == pytest.approx((0.028341, 0.935958), abs=5e-7)
    c = path.path(torch.tensor([1.0], dtype=torch.float64))
    assert (c.alpha + c.sigma).item() == pytest.approx(1.065932, abs=5e-7)


def test_vp_meets_its_table_and_is_variance_preserving():
    cumulative = scaled_linear(50)
    c = vp(cumulative).path(torch.arange(50, dtype=torch.float64) / 49)
    assert (c.alpha.square() - cumulative).abs().max() < 1e-12
    assert (c.alpha.square() + c.sigma.square() - 1).abs().max() < 1e-12
    # halfway between two entries log(sigma/alpha) is their mean
    middle = vp(cumulative).ratio(torch.tensor([10.5 / 49], dtype=torch.float64))
    ratio = ((1 - cumulative) / cumulative).sqrt()
    assert middle.item() == pytest.approx((ratio[10] * ratio[11]).sqrt().item(), rel=1e-12)


def test_vp_of_zero_terminal_snr_stays_finite():
    cumulative = scaled_linear()
    cumulative[-1] = 0.0
    c = vp(cumulative).path(torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert c.alpha[1].item() == pytest.approx(1e-6) and all(torch.isfinite(value).all() for value in c)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9]),
        torch.tensor([0.5, 0.6]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([0.5, -0.1]),
        torch.ones(2, 2),
    ],
)
def test_vp_refuses_what_is_no_schedule(table):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[N >= 2\], decreasing, below 1; got shape"):
        vp(table)


def test_coordinate_maps_describe_one_point():  # consistency 0.2
    data, noise, t = points("maps")
    t = t * 0.9 + 0.03  # where Stable Diffusion's schedule reaches
    sigma = t / (1 - t)
    x_lin, x_edm = linear().mix(data, noise, t), edm().mix(data, noise, t)
    assert (x_edm - (data + like(sigma, data) * noise)).abs().max() < 1e-12
    assert (x_lin - (1 - like(t, data)) * x_edm).abs().max() < 1e-12
    # EDM: dx/dsigma = noise, dsigma/dt = (1 + sigma)^2
    v_edm = edm().velocity(data, noise, t)
    assert ((v_edm - like((1 + sigma) ** 2, data) * noise) / (1 + v_edm.abs())).abs().max() < 1e-12
    # VP: x_lin = x_vp / (a + s)
    path = vp(scaled_linear())
    at = path.time_of(sigma)
    c = path.path(at)
    x_vp = path.mix(data, noise, at)
    assert (x_lin - x_vp / like(c.alpha + c.sigma, data)).abs().max() < 1e-9
    # TrigFlow: x_trig = cos x_edm; t = sd sin / (cos + sd sin); per angle, dx_trig = (cos x_trig - data) / sin
    sd = 0.5
    angle = torch.atan(sigma / sd)
    cos, sin = angle.cos(), angle.sin()
    at = trig(sd).time_of(sigma)
    x_trig = trig(sd).mix(data, noise, at)
    assert (at - angle / (math.pi / 2)).abs().max() < 1e-12
    assert (x_trig - like(cos, data) * x_edm).abs().max() < 1e-12
    assert (t - sd * sin / (cos + sd * sin)).abs().max() < 1e-12
    assert (x_lin - x_trig / like(cos + sd * sin, data)).abs().max() < 1e-12
    per_angle = trig(sd).velocity(data, noise, at) / (math.pi / 2)
    assert (per_angle - (like(cos, data) * x_trig - data) / like(sin, data)).abs().max() < 1e-9
    # VP's v-prediction is trig's velocity per angle at sigma_data 1
    at = trig().time_of(sigma)
    v_prediction = trig().predict(data, noise, at, "v_prediction")
    assert (v_prediction - trig().velocity(data, noise, at) / (math.pi / 2)).abs().max() < 1e-12


def test_a_time_broadcasts_over_rows_when_all_sizes_agree():  # the classic silent bug: [32] against the last axis of 32
    data, noise, t = (torch.randn(32, 3, 32, 32, generator=generator("rows", i), dtype=torch.float64) for i in range(3))
    t = t[:, 0, 0, 0].sigmoid()
    for path in PATHS:
        x_t, v = path.mix(data, noise, t), path.velocity(data, noise, t)
        got_data, _ = path.split(x_t, v, t)
        for row in (0, 7, 31):
            c = path.path(t[row : row + 1])
            assert torch.allclose(x_t[row], c.alpha * data[row] + c.sigma * noise[row], rtol=0, atol=1e-12)
            assert torch.allclose(v[row], c.d_alpha * data[row] + c.d_sigma * noise[row], rtol=0, atol=1e-9)
        assert (got_data - data).abs().max() < 1e-9


BAD_TIMES = [
    torch.tensor(0.5),
    torch.full((32, 1), 0.5),
    torch.full((32, 1, 1, 1), 0.5),
    torch.full((31,), 0.5),
    torch.full((1,), 0.5),
]


@pytest.mark.parametrize("t", BAD_TIMES, ids=lambda t: str(list(t.shape)))
def test_any_other_shape_of_time_is_refused_everywhere(t):
    x = torch.zeros(32, 3, 32, 32)
    message = r"a time must have shape \[B\] = \[32\] for x of shape \[32, 3, 32, 32\], got"
    with pytest.raises(ValueError, match=message):
        like(t, x)
    for path in PATHS:
        calls = [lambda p=path: p.mix(x, x, t), lambda p=path: p.velocity(x, x, t), lambda p=path: p.split(x, x, t)]
        calls += [lambda p=path, k=k: p.predict(x, x, t, k) for k in KINDS]
        calls += [lambda p=path, k=k: p.split(x, x, t, k) for k in KINDS]
        calls += [lambda p=path, k=k: p.convert(x, x, t, k, "velocity") for k in KINDS]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


def test_a_sample_prediction_says_nothing_at_the_data_itself():
    for path, kind, t in ((linear(), "sample", 0.0), (linear(), "epsilon", 1.0), (edm(), "sample", 0.0)):
        with pytest.raises(ValueError, match=f"a {kind} prediction does not determine the data at the given t"):
            path.split(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0.5, t]), kind)
