"""Closed-form teachers: identities I1-I7 of flow maps, quantiles against Runge-Kutta, exact data."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, norm

from distill.core.errors import InputError
from distill.flow import draws
from distill.flow.interpolants import edm, like, linear, vp
from distill.protocols import FlowMap, Teacher, VelocityField
from distill.spec.model import GaussianTeacher, MixtureTeacher
from distill.teachers.analytic import GaussianField, MixtureField, gaussian_teacher, mixture_teacher
from distill.testing.closed_form import GaussianFlowMap, QuantileFlowMap, class_gaussian_teacher, trig

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 1.3, 0.2], dtype=torch.float64)
MEANS_1D = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
STD_1D = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def randn(name, *shape):
    return torch.randn(*shape, generator=draws.generator("analytic", name), dtype=torch.float64)


def rand(name, count):
    return torch.rand(count, generator=draws.generator("analytic", name), dtype=torch.float64)


def cosine_vp():
    n = torch.arange(1, 1001, dtype=torch.float64) / 1001
    return vp((n * math.pi / 2).cos().square())


PATHS = [linear(), trig(), trig(0.5), edm(), cosine_vp()]
IDS = ["linear", "trig", "trig-0.5", "edm", "vp"]


class Problem:
    """An exact field v, its exact flow map u, X from u, and points (x, t, s) with s < t of its marginals."""

    def __init__(self, field, flow_map, dim):
        self.v, self.u = field, flow_map
        self.x = randn("x", 40, dim)
        self.t = 0.3 + 0.65 * rand("t", 40)
        self.s = self.t * (0.05 + 0.9 * rand("s", 40))

    def X(self, x, t, s):
        return x + like(s - t, x) * self.u(x, t, s, {})


def gaussian(path=None):
    return Problem(GaussianField(MEAN, STD, path), GaussianFlowMap(MEAN, STD, path), 3)


def mixture(path=None):
    field = MixtureField(MEANS_1D[:, None], STD_1D, WEIGHTS, path)
    return Problem(field, QuantileFlowMap(MEANS_1D, STD_1D, WEIGHTS, path), 1)


CASES = [gaussian(path) for path in PATHS[:4]] + [mixture(path) for path in PATHS[:3]]
CASE_IDS = [f"gaussian-{i}" for i in IDS[:4]] + [f"mixture-{i}" for i in IDS[:3]]
pytestmark = pytest.mark.costs("teacher gaussian", "teacher mixture")
each = pytest.mark.parametrize("p", CASES, ids=CASE_IDS)


def close(a, b, tolerance=1e-10):
    return ((a - b).abs() / (1 + b.abs())).max() < tolerance


def jvp(function, at, along):
    return torch.func.jvp(function, tuple(at), tuple(along))[1]


@each
def test_i1_the_map_moves_with_the_velocity_at_its_end(p):  # Lagrangian
    one = torch.ones_like(p.s)
    slope = jvp(lambda s: p.X(p.x, p.t, s), [p.s], [one])
    assert close(slope, p.v(p.X(p.x, p.t, p.s), p.s, {}), 1e-8)


@each
def test_i2_the_map_does_not_change_along_its_path(p):  # Eulerian
    one = torch.ones_like(p.t)
    change = jvp(lambda x, t: p.X(x, t, p.s), [p.x, p.t], [p.v(p.x, p.t, {}), one])
    assert change.abs().max() / (1 + p.v(p.x, p.t, {}).abs().max()) < 1e-8


@each
def test_i3_maps_compose(p):  # semigroup
    middle = (p.t + p.s) / 2
    assert close(p.X(p.X(p.x, p.t, middle), middle, p.s), p.X(p.x, p.t, p.s))


@each
def test_i4_meanflow(p):  # u = v - (t - s) Du/Dt, Du/Dt the derivative along (v, 1, 0)
    v, zero, one = p.v(p.x, p.t, {}), torch.zeros_like(p.t), torch.ones_like(p.t)
    total = jvp(lambda x, t, s: p.u(x, t, s, {}), [p.x, p.t, p.s], [v, one, zero])
    assert close(p.u(p.x, p.t, p.s, {}), v - like(p.t - p.s, v) * total, 1e-8)


@each
def test_i5_lagrangian_of_the_average_velocity(p):  # u = v(X, s) + (t - s) du/ds
    slope = jvp(lambda s: p.u(p.x, p.t, s, {}), [p.s], [torch.ones_like(p.s)])
    v = p.v(p.X(p.x, p.t, p.s), p.s, {})
    assert close(p.u(p.x, p.t, p.s, {}), v + like(p.t - p.s, v) * slope, 1e-8)


@each
def test_i6_average_velocities_split(p):
    middle = p.s + 0.3 * (p.t - p.s)
    whole = like(p.t - p.s, p.x) * p.u(p.x, p.t, p.s, {})
    first = like(p.t - middle, p.x) * p.u(p.x, p.t, middle, {})
    second = like(middle - p.s, p.x) * p.u(p.X(p.x, p.t, middle), middle, p.s, {})
    assert close(first + second, whole)


def test_i7_what_the_map_splits_off_is_free_of_coordinates():
    # X = (s/t) x + (1 - s/t) g: in EDM's coordinates with sigma for t, g is the same number
    x, t, s = randn("i7", 40, 3), 0.3 + 0.6 * rand("t7", 40), 0.05 + 0.2 * rand("s7", 40)
    in_linear, in_edm = gaussian(), gaussian(edm())
    g = x - like(t, x) * in_linear.u(x, t, s, {})
    ratio = like(s / t, x)
    assert close(ratio * x + (1 - ratio) * g, in_linear.X(x, t, s))
    sigma_ratio = like((s / (1 - s)) / (t / (1 - t)), x)
    x_edm = x / like(1 - t, x)
    g_edm = (in_edm.X(x_edm, t, s) - sigma_ratio * x_edm) / (1 - sigma_ratio)
    assert close(g_edm, g)
    # g -> E[data | x] as s -> t
    data, _ = linear().split(x, in_linear.v(x, t, {}), t)
    assert close(x - like(t, x) * in_linear.u(x, t, t - 1e-7, {}), data, 1e-5)


@each
def test_at_equal_times_the_average_velocity_is_the_velocity(p):
    assert close(p.u(p.x, p.t, p.t, {}), p.v(p.x, p.t, {}), 1e-12)
    assert close(p.u(p.x, p.t, p.t - 1e-4, {}), p.v(p.x, p.t, {}), 2e-2)
    assert isinstance(p.v, VelocityField) and isinstance(p.u, FlowMap)


def test_the_gaussian_map_does_not_cancel_as_times_meet():
    for path in PATHS[:4]:
        p = gaussian(path)
        v = p.v(p.x, p.t, {})
        for gap in (1e-4, 1.0001e-5, 0.9999e-5, 1e-7, 1e-10, 1e-13):
            middle = p.v(p.X(p.x, p.t, p.t - gap / 2), p.t - gap / 2, {})  # u is v halfway, to gap^2
            assert ((p.u(p.x, p.t, p.t - gap, {}) - middle).abs() / (1 + v.abs())).max() < 1e-9 + 1e3 * gap**2


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_the_whole_gaussian_map_is_mean_plus_std_times_noise(path):
    noise, one = randn("whole", 20, 3), torch.ones(20, dtype=torch.float64)
    high = torch.full((20,), 0.98 if path.name == "edm" else 1.0, dtype=torch.float64)
    p, c = gaussian(path), path.path(high)
    q = (like(c.alpha, noise) ** 2 * STD**2 + like(c.sigma, noise) ** 2).sqrt()
    x = like(c.alpha, noise) * MEAN + q * noise
    low = path.path(0 * one)
    q = (like(low.alpha, noise) ** 2 * STD**2 + like(low.sigma, noise) ** 2).sqrt()
    assert close(p.X(x, high, 0 * one), like(low.alpha, noise) * MEAN + q * noise)


def test_the_gaussian_field_is_the_sheets():  # consistency 0.3
    x, t = randn("sheet", 50, 3), rand("sheet t", 50)
    at = like(t, x)
    q = ((1 - at) ** 2 * STD**2 + at**2).sqrt()
    expected = -MEAN + (at - (1 - at) * STD**2) / q**2 * (x - (1 - at) * MEAN)
    assert close(GaussianField(MEAN, STD)(x, t, {}), expected, 1e-13)


def test_a_field_is_the_mean_velocity_of_the_lines_through_a_point():
    # E[noise - data | x_t = x] by quadrature over the data: no formula of the field is used
    field, t, x = MixtureField(MEANS_1D[:, None], STD_1D, WEIGHTS), 0.6, 0.3

    def weight(data):
        density = sum(w * norm.pdf(data, m, s) for w, m, s in zip(WEIGHTS, MEANS_1D, STD_1D, strict=True))
        return float(density * norm.pdf((x - (1 - t) * data) / t))

    mass = quad(weight, -6, 6, epsabs=1e-12)[0]
    mean = quad(lambda data: weight(data) * ((x - (1 - t) * data) / t - data), -6, 6, epsabs=1e-12)[0] / mass
    got = field(torch.tensor([[x]], dtype=torch.float64), torch.tensor([t], dtype=torch.float64), {})
    assert got.item() == pytest.approx(mean, abs=1e-9)


# --- mixtures ---


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_a_mixture_of_one_is_the_gaussian(path):
    x, t = randn("one", 30, 3), 0.98 * rand("one t", 30)
    one = MixtureField(MEAN[None], 0.7, interpolant=path)
    assert close(one(x, t, {}), GaussianField(MEAN, torch.full((3,), 0.7), path)(x, t, {}), 1e-6)  # 0.7 in float32
    std = torch.full((3,), 0.7, dtype=torch.float64)
    assert close(one(x, t, {}), GaussianField(MEAN, std, path)(x, t, {}), 1e-12)


def test_the_mixture_field_is_exact_at_both_ends():
    means, x = torch.stack([MEAN, -MEAN]), randn("ends", 20, 3)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    field, one = MixtureField(means, 0.4, weights), torch.ones(20, dtype=torch.float64)
    assert close(field(x, one, {}), x - weights @ means, 1e-13)  # noise minus the mean of the data
    assert close(field(x, 0 * one, {}), -x, 1e-13)  # E[noise] = 0 minus the data
    near = field(x, 0 * one + 1e-9, {})
    assert close(near, -x, 1e-7)
    far = field(1e4 * x, one / 2, {})  # where every density underflows
    assert far.isfinite().all()


def test_images_are_vectors_to_the_mixture():
    means = randn("images", 4, 2, 5, 5)
    x, t = randn("image x", 3, 2, 5, 5), rand("image t", 3)
    flat = MixtureField(means.flatten(1), 0.5)(x.flatten(1), t, {})
    assert torch.equal(MixtureField(means, 0.5)(x, t, {}), flat.reshape(x.shape))


def test_a_class_of_the_mixture_is_its_component_and_null_is_all():
    means = torch.stack([MEAN, -MEAN, 0 * MEAN])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    field = MixtureField(means, 0.4, weights, conditional=True)
    x, t = randn("classes", 4, 3), rand("classes t", 4)
    v = field(x, t, {"class_labels": torch.tensor([2, 0, 3, 1])})
    std = torch.full((3,), 0.4, dtype=torch.float64)
    for row, component in ((0, 2), (1, 0), (3, 1)):
        expected = GaussianField(means[component], std)(x[row : row + 1], t[row : row + 1], {})
        assert close(v[row : row + 1], expected, 1e-13)
    assert close(v[2:3], MixtureField(means, 0.4, weights)(x[2:3], t[2:3], {}), 1e-13)


@pytest.mark.parametrize("path", [linear(), trig(0.5)], ids=["linear", "trig-0.5"])
def test_the_quantile_map_is_runge_kutta(path):  # consistency 0.4
    p = mixture(path)
    steps, x = 300, torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    high, low = 0.95, 0.02
    h, state = (low - high) / steps, x
    for i in range(steps):
        t = torch.full((25,), high + i * h, dtype=torch.float64)
        a = p.v(state, t, {})
        b = p.v(state + h / 2 * a, t + h / 2, {})
        c = p.v(state + h / 2 * b, t + h / 2, {})
        state = state + h / 6 * (a + 2 * b + 2 * c + p.v(state + h * c, t + h, {}))
    ends = [torch.full((25,), end, dtype=torch.float64) for end in (high, low)]
    assert (p.u.jump(x, *ends) - state).abs().max() < 1e-8


def test_the_quantile_map_takes_noise_to_data_in_distribution_and_far_into_the_tails():
    u, one = QuantileFlowMap(MEANS_1D, STD_1D, WEIGHTS), torch.ones(1, dtype=torch.float64)
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    data = u.jump(torch.special.ndtri(quantiles)[None], one, 0 * one)[0]
    cdf = sum(w * torch.special.ndtr((data - m) / s) for w, m, s in zip(WEIGHTS, MEANS_1D, STD_1D, strict=True))
    assert (cdf - quantiles).abs().max() < 1e-13
    tails = u.jump(torch.tensor([[-30.0, 30.0]], dtype=torch.float64), one, 0 * one)[0]
    assert tails[0] < -1.5 - 0.5 * 29.9 and tails[1] > 0.2 and tails.isfinite().all()
    back = u.jump(tails[None], 0 * one, one)[0]
    assert (back - torch.tensor([-30.0, 30.0])).abs().max() < 1e-9


def test_the_quantile_map_of_one_component_is_the_gaussians():
    x, t, s = randn("q1", 30, 2, 4), 0.05 + 0.95 * rand("q1 t", 30), rand("q1 s", 30)
    u = QuantileFlowMap(torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    shape = torch.ones(2, 4, dtype=torch.float64)
    assert close(u(x, t, s, {}), GaussianFlowMap(0.7 * shape, 0.3 * shape)(x, t, s, {}), 1e-9)


# --- teachers ---


def test_a_gaussian_teacher_knows_its_data():
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=MEAN.tolist(), std=STD.tolist()))
    assert isinstance(teacher, Teacher)
    assert (teacher.shape, teacher.num_classes, teacher.network) == ((3,), None, None)
    data = teacher.exact_data(0, range(3000))
    assert data.dtype == torch.float32
    for i in range(3):
        assert kstest(data[:, i].numpy(), norm(MEAN[i].item(), STD[i].item()).cdf).pvalue > 0.01
    x, t = randn("teacher", 5, 3), rand("teacher t", 5)
    assert torch.equal(teacher.field(x, t, {}), GaussianField(MEAN, STD)(x, t, {}))


def test_a_mixture_teacher_knows_its_data():
    spec = MixtureTeacher(kind="mixture", means=MEANS_1D[:, None].tolist(), std=0.3, weights=[5, 2, 3])
    data = mixture_teacher(spec).exact_data(0, range(5000))[:, 0].numpy()
    cdf = lambda x: sum(w * norm.cdf(x, m, 0.3) for w, m in zip(WEIGHTS.tolist(), MEANS_1D.tolist(), strict=True))  # noqa: E731
    assert kstest(data, cdf).pvalue > 0.01
    equal = mixture_teacher(MixtureTeacher(kind="mixture", means=[[0.0, 9.0], [9.0, 0.0]], std=0.1))
    first = (equal.exact_data(3, range(4000))[:, 0] > 4.5).double().mean().item()
    assert equal.shape == (2,) and abs(first - 0.5) < 4 * 0.5 / 4000**0.5


TEACHERS = {
    "gaussian": lambda: gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.0, 1.0], std=[1.0, 2.0])),
    "mixture": lambda: mixture_teacher(MixtureTeacher(kind="mixture", means=[[0.0, 1.0], [2.0, 3.0]], std=0.5)),
    "classes": lambda: class_gaussian_teacher(torch.eye(2), torch.zeros(2), torch.ones(2)),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_exact_data_depends_on_seed_and_index_alone_and_not_on_the_sampling_noise(name):
    exact = TEACHERS[name]().exact_data
    whole = exact(4, range(40))
    assert torch.equal(whole, torch.cat([exact(4, range(25)), exact(4, range(25, 40))]))
    assert torch.equal(whole[[7, 3]], exact(4, [7, 3])) and not torch.equal(whole, exact(5, range(40)))
    noise, data = draws.sample_noise(4, range(2000), (2,)).double(), exact(4, range(2000)).double()
    correlation = torch.corrcoef(torch.cat([noise, data], 1).T)[:2, 2:]
    assert correlation.abs().max() < 4 / 2000**0.5


def test_digests_name_the_teacher():
    digests = [TEACHERS[name]().digest for name in TEACHERS]
    digests += [gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.0, 1.0], std=[1.0, 2.1])).digest]
    assert len({*digests}) == 4 and all(len(d) == 64 for d in digests)
    assert TEACHERS["mixture"]().digest == digests[1]


def test_the_classes_of_the_guided_oracle():
    teacher = TEACHERS["classes"]()
    assert (teacher.num_classes, teacher.null_class, teacher.shape) == (2, 2, (2,))
    assert teacher.null({"class_labels": torch.tensor([0, 1])})["class_labels"].tolist() == [2, 2]
    data = teacher.exact_data(0, range(2000))
    assert (data[::2].mean(0) - torch.tensor([1.0, 0.0])).abs().max() < 4 / 1000**0.5
    assert (data[1::2].mean(0) - torch.tensor([0.0, 1.0])).abs().max() < 4 / 1000**0.5


def test_an_unconditional_teacher_refuses_guidance():
    for name in ("gaussian", "mixture"):
        teacher = TEACHERS[name]()
        assert teacher.guided(1.0) is teacher.field
        with pytest.raises(
            InputError,
            match=f"the {name.title() if name == 'gaussian' else name}.* has no class id for the unconditional call",
        ):
            teacher.guided(2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianTeacher(kind="gaussian", mean=[0.0], std=[1.0, 2.0]), "mean has 1 numbers and teacher.std 2"),
        (lambda: GaussianTeacher(kind="gaussian", mean=[], std=[]), "teacher.mean has 0 numbers and teacher.std 0"),
        (lambda: MixtureTeacher(kind="mixture", means=[[0.0], [1.0, 2.0]], std=1.0), r"got lengths \[1, 2\]"),
        (
            lambda: MixtureTeacher(kind="mixture", means=[], std=1.0),
            r"rows of one length of at least 1, got lengths \[\]",
        ),
        (
            lambda: MixtureTeacher(kind="mixture", means=[[0.0]], std=1.0, weights=[1, 2]),
            "weights has 2 numbers for 1 rows",
        ),
    ],
)
def test_a_teacher_that_makes_no_sense_is_refused(call, message):
    spec = call()
    with pytest.raises(InputError, match=message):
        (gaussian_teacher if isinstance(spec, GaussianTeacher) else mixture_teacher)(spec)
