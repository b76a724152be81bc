"""Velocity fields that wrap other fields: guidance is exact and counted; a change of schedule gives the same ODE."""

import math

import pytest
import torch

from distill.flow.draws import generator
from distill.flow.fields import (
    Counted,
    Rescheduled,
    calls_per_sample,
    drop_condition,
    jump_to_data,
    rows_to_call,
    start,
)
from distill.flow.guidance import Guided
from distill.flow.interpolants import edm, like, linear, vp
from distill.protocols import VelocityField
from distill.teachers.analytic import GaussianField, MixtureField
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher, trig

MEAN, VARIANCE = 0.7, 0.3
MEANS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
NULL = torch.tensor([-0.5, 1.0, 0.2], dtype=torch.float64)
STD = torch.tensor([0.5, 1.3, 0.2], dtype=torch.float64)


def stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return vp((1 - betas).cumprod(0))


def randn(name, *shape):
    return torch.randn(*shape, generator=generator("fields", name), dtype=torch.float64)


def v1(x, t):
    """The linear-path velocity of N(MEAN, VARIANCE), as the sheet writes it (reflow 0.6)."""
    t = like(t, x)
    q = (1 - t) ** 2 * VARIANCE + t**2
    return -MEAN + (t - (1 - t) * VARIANCE) / q * (x - (1 - t) * MEAN)


class Predicting:
    """A network that predicts exactly, as a field: E[noise | x] or E[data | x] for data N(MEAN, VARIANCE)."""

    def __init__(self, interpolant, t_range, kind):
        self.interpolant, self.t_range, self.kind = interpolant, t_range, kind

    def __call__(self, x_t, t, cond):
        c = self.interpolant.path(t)
        alpha, sigma = like(c.alpha, x_t), like(c.sigma, x_t)
        offset, variance = x_t - alpha * MEAN, alpha**2 * VARIANCE + sigma**2
        data, noise = MEAN + alpha * VARIANCE / variance * offset, sigma / variance * offset
        prediction = data if self.kind == "sample" else noise
        return self.interpolant.convert(x_t, prediction.to(x_t.dtype), t, self.kind, "velocity").to(x_t.dtype)


ORACLES = {
    "vp epsilon": Predicting(stable_diffusion(), (0.0, 1.0), "epsilon"),
    "vp sample": Predicting(stable_diffusion(), (0.0, 1.0), "sample"),
    "edm sample": Predicting(edm(), (0.002 / 1.002, 80 / 81), "sample"),
    "trig epsilon": Predicting(trig(), (0.01, 0.99), "epsilon"),
    "trig of sigma_data 0.5": Predicting(trig(0.5), (0.01, 0.99), "sample"),
    "linear": Predicting(linear(), (0.0, 0.99), "epsilon"),
}


# --- Rescheduled ---


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_any_schedule_brought_to_the_linear_path_is_v1(name, dtype, tolerance):  # T02
    field = Rescheduled(ORACLES[name], linear())
    assert isinstance(field, VelocityField)
    low, high = field.t_range
    t = torch.linspace(low, high, 101, dtype=torch.float64)  # both ends included
    x = (randn(name, 101, 2, 3, 3) * 1.5).to(dtype)  # float32: EDM divides its rounding by sigma_min = 0.002
    v = field(x, t.to(dtype), {})
    assert v.dtype == dtype
    assert (v.double() - v1(x.double(), t)).abs().max() < tolerance


def test_stable_diffusions_range_in_linear_time():
    assert Rescheduled(ORACLES["vp epsilon"], linear()).t_range == pytest.approx((0.028341, 0.935958), abs=5e-7)
    assert Rescheduled(ORACLES["edm sample"], linear()).t_range == pytest.approx((0.001996, 0.987654), abs=5e-7)
    assert Rescheduled(GaussianField(NULL, STD), trig()).t_range == (0.0, 1.0)


def test_there_and_back_is_the_field():
    for name, middle in (("vp epsilon", edm()), ("edm sample", trig(0.5)), ("trig epsilon", linear())):
        field = ORACLES[name]
        back = Rescheduled(Rescheduled(field, middle), field.interpolant)
        assert back.t_range == pytest.approx(field.t_range, abs=1e-9)
        t = torch.linspace(*field.t_range, 50, dtype=torch.float64)
        x = like(field.interpolant.path(t).sigma + 1, torch.ones(50, 4)) * randn(name, 50, 4)
        v = field(x, t, {})
        assert ((back(x, t, {}) - v).abs() / (1 + v.abs())).max() < 1e-8, name


def test_the_exact_field_of_a_path_is_the_rescheduled_field_of_another():
    means, std = MEANS, torch.tensor([0.4, 0.9], dtype=torch.float64)
    vp_path = stable_diffusion()
    for to in (vp_path, trig(), trig(0.5)):
        exact = MixtureField(means, std, interpolant=to)
        field = Rescheduled(MixtureField(means, std), to)
        t = torch.linspace(0.01, 0.99, 60, dtype=torch.float64)
        x = randn(to.name, 60, 3)
        v = exact(x, t, {})
        assert ((field(x, t, {}) - v).abs() / (1 + v.abs())).max() < 1e-9, to.name


def test_a_time_outside_the_teachers_range_is_refused_but_rounding_is_not():
    field = Rescheduled(ORACLES["vp epsilon"], linear())
    x = torch.zeros(2, 4)
    for t in (0.0, 0.02, 0.95, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"t must be within \[0.0283405, 0.935958\], got \["):
            field(x, torch.tensor([0.5, t]), {})
    low, high = field.t_range
    field(x, torch.tensor([low - 1e-8, high + 1e-8], dtype=torch.float64), {})


def test_the_field_is_called_once_at_its_own_time_and_scale():
    seen = []

    class Spy(Predicting):
        def __call__(self, x_t, t, cond):
            seen.append((x_t, t))
            return super().__call__(x_t, t, cond)

    field = Rescheduled(Spy(edm(), (0.001, 0.99), "sample"), linear())
    x, t = randn("spy", 3, 2), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    field(x, t, {})
    (x_edm, t_edm), = seen  # fmt: skip
    assert torch.allclose(t_edm, t, rtol=0, atol=1e-15) and torch.allclose(x_edm, x / (1 - t)[:, None], rtol=1e-14)


# --- Guided ---


def test_scale_one_is_bitwise_the_field_in_one_call():
    teacher = class_gaussian_teacher(MEANS, NULL, STD)
    counted = Counted(teacher.field)
    x, t, cond = randn("one", 5, 3), torch.full((5,), 0.4), {"class_labels": torch.tensor([0, 1, 0, 1, 1])}
    guided = Guided(counted, teacher.null, 1.0)
    assert torch.equal(guided(x, t, cond), teacher.field(x, t, cond))
    assert (counted.calls, counted.rows) == (1, 5)
    assert teacher.guided(1.0) is teacher.field


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_a_guided_gaussian_is_the_gaussian_of_the_shifted_mean(scale):  # consistency 0.5
    teacher = class_gaussian_teacher(MEANS, NULL, STD)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    x, t = randn("guided", 6, 3), torch.rand(6, generator=generator("guided t"), dtype=torch.float64)
    v = teacher.guided(scale)(x, t, {"class_labels": labels})
    for row, label in enumerate(labels.tolist()):
        shifted = GaussianField(NULL + scale * (MEANS[label] - NULL), STD)
        expected = shifted(x[row : row + 1], t[row : row + 1], {})
        assert (v[row] - expected[0]).abs().max() < 1e-12


def test_guidance_is_one_call_of_twice_the_rows_and_counts_as_two():
    teacher = class_gaussian_teacher(MEANS, NULL, STD)
    counted = Counted(teacher.field)
    x, t, cond = randn("two", 5, 3), torch.full((5,), 0.4), {"class_labels": torch.tensor([0, 1, 0, 1, 1])}
    v = Guided(counted, teacher.null, 2.0)(x, t, cond)
    assert (counted.calls, counted.rows) == (1, 10)
    v_cond, v_null = teacher.field(x, t, cond), teacher.field(x, t, teacher.null(cond))
    assert torch.equal(v, v_null + 2.0 * (v_cond - v_null))
    outer = Counted(Rescheduled(teacher.guided(2.0), trig()))
    outer(x, t, cond)
    outer(x, t, cond)
    assert outer.calls == 4 and calls_per_sample(outer, t) == 2
    assert calls_per_sample(Guided(teacher.field, teacher.null, 1.0), t) == 1


def test_guidance_of_nothing_is_refused():
    x, t = torch.zeros(2, 3), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=r"guidance needs a condition to drop: cond has \[\], its null condition \[\]"):
        Guided(GaussianField(NULL, STD), lambda cond: cond, 2.0)(x, t, {})
    with pytest.raises(ValueError, match=r"cond has \['a'\], its null condition \['b'\]"):
        Guided(GaussianField(NULL, STD), lambda cond: {"b": cond["a"]}, 2.0)(x, t, {"a": torch.zeros(2)})


# --- start, drop_condition, times of the wrong shape ---


def test_start_is_the_stock_schedulers_initial_noise():
    noise = randn("start", 4, 2)
    assert torch.equal(start(GaussianField(NULL, STD), noise), noise)
    assert torch.allclose(start(ORACLES["vp epsilon"], noise), noise, rtol=1e-12)
    edm_start = start(ORACLES["edm sample"], noise)
    assert torch.allclose(edm_start, math.sqrt(80**2 + 1) * noise, rtol=1e-12)
    assert start(ORACLES["edm sample"], noise.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ORACLES)
def test_start_and_change_of_schedule_commute(name):
    field, noise = ORACLES[name], randn("commute", 4, 2)
    c = field.interpolant.path(torch.tensor([field.t_range[1]], dtype=torch.float64))
    assert torch.allclose(start(Rescheduled(field, linear()), noise), start(field, noise) / (c.alpha + c.sigma))


def test_drop_condition_changes_exactly_the_masked_rows():
    mask = torch.tensor([True, False, False, True])
    cond = {"class_labels": torch.tensor([3, 1, 4, 1]), "text": randn("text", 4, 2, 5)}
    null = {"class_labels": torch.full((4,), 10), "text": torch.zeros(4, 2, 5, dtype=torch.float64)}
    dropped = drop_condition(cond, null, mask)
    assert dropped["class_labels"].tolist() == [10, 1, 4, 10]
    assert torch.equal(dropped["text"][1:3], cond["text"][1:3]) and not dropped["text"][[0, 3]].any()
    assert drop_condition({}, {}, mask) == {}
    with pytest.raises(ValueError, match=r"cond has \['a'\], its null condition \[\]"):
        drop_condition({"a": mask}, {}, mask)
    with pytest.raises(ValueError, match=r"a mask of rows must be bool \[B\], got \[4\] in torch.float32"):
        drop_condition(cond, null, mask.float())
    with pytest.raises(ValueError, match=r"a mask of rows must be bool \[B\], got \[3\] in torch.bool"):
        drop_condition(cond, null, mask[:3])


BAD_TIMES = [torch.tensor(0.5), torch.full((32, 1), 0.5), torch.full((31,), 0.5), torch.full((1,), 0.5)]


@pytest.mark.parametrize("t", BAD_TIMES, ids=lambda t: str(list(t.shape)))
def test_every_field_refuses_another_shape_of_time(t):
    x, shape = torch.zeros(32, 3, 32, 32), torch.zeros(3, 32, 32)
    cond = {"class_labels": torch.zeros(32, dtype=torch.int64)}
    gaussian = GaussianField(shape, shape + 1)
    mixture = MixtureField(torch.zeros(2, 3, 32, 32), 1.0)
    for field in (gaussian, mixture, Guided(mixture, dict, 2.0), Rescheduled(gaussian, trig()), Counted(gaussian)):
        with pytest.raises(ValueError, match=r"a time must have shape \[B\] = \[32\] for x of shape \[32, 3, 32, 32\]"):
            field(x, t, cond)


def test_a_network_is_called_for_one_row_at_least():
    assert rows_to_call(torch.tensor([False, True, True])).tolist() == [1, 2]
    assert rows_to_call(torch.tensor([False, False])).tolist() == [0]


def test_the_jump_of_a_clean_sample_is_itself():
    x = torch.randn(5, 3, generator=generator("jump"))
    anything = exact.Network(lambda x_t, t, s, cond: x_t.square() + 17)
    assert torch.equal(jump_to_data(anything, x, torch.zeros(5), {}), x)
