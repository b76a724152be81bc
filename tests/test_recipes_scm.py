"""Recipe scm at its exact solution (sheet consistency 2.1): the tangent vanishes at the flow map, as in TrigFlow."""

import math

import pytest
import torch
from pydantic import ValidationError

from distill import testing
from distill.flow import tangents
from distill.flow.interpolants import like
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap
from recipes.consistency.scm import Config, Recipe

FACM = {"tangent": "clipped", "anchor": 1.0}
OTHER = GaussianFlowMap(exact.MEAN / 2, exact.STD.flip(0))  # of another law


def loss(options, network, count=64, progress=1.0, batch=None, **fixed):
    made = Recipe(Config(**options), exact.teacher(exact.FIELD))
    nets = exact.nets(made, exact.Given(exact.Network(network)))
    turn, *_ = made.turns(0, 0)
    return turn.loss(nets, batch or exact.batch(count), exact.context(count, progress=progress, **fixed))


@pytest.mark.parametrize("options", [{}, {"sigma_data": 1.3}, {"tangent": "linear"}, FACM])
def test_the_tangent_vanishes_at_the_flow_map(options):  # T1
    assert loss(options, exact.FLOW_MAP).logs["tangent"] < 1e-9  # times are float32
    assert loss(options, OTHER).logs["tangent"] > 1e-2
    if options == FACM:
        assert loss(options, exact.FLOW_MAP).total < 1e-8, "nor is there anything to learn at s = t"
    else:
        assert loss(options, exact.FLOW_MAP, progress=0.05).logs["tangent"] > 1e-3, "while the derivative counts half"


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.13])
def test_the_tangent_is_that_of_trigflow(sigma_data, factor):
    """Written as in the paper, for F(x / sd, th): equation (7), and the factor of algorithm 1."""
    sd, x_lin = sigma_data, exact.batch(32, seed=3).data
    t = torch.linspace(0.05, 0.97, 32, dtype=torch.float64)
    th = torch.atan(t / (1 - t) / sd)

    def parts(x, th):
        """f and D of the linear path, and F."""
        cos, sin = like(th.cos(), x), like(th.sin(), x)
        at = sd * th.sin() / (th.cos() + sd * th.sin())
        linear = x / (cos + sd * sin)
        end = linear - like(at, x) * OTHER(linear, at, torch.zeros_like(at), {})
        denoised = linear - like(at, x) * exact.FIELD(linear, at, {})
        return end, denoised, (cos * x - end) / (sd * sin)

    cos, sin = like(th.cos(), x_lin), like(th.sin(), x_lin)
    x = x_lin * (cos + sd * sin)
    _, denoised, big_f = parts(x, th)
    dx = (cos * x - denoised) / sin
    slope = torch.func.jvp(lambda x, th: parts(x, th)[2], (x, th), (dx, torch.ones_like(th)))[1]
    g = -(cos**2) * (sd * big_f - dx) - factor * cos * sin * (x + sd * slope)
    expected = g / (like(g.square().mean(1).sqrt(), g) + 0.1)

    def u(x_t, t):
        return OTHER(x_t, t, torch.zeros_like(t), {})

    v = exact.FIELD(x_lin, t, {})
    du = torch.func.jvp(u, (x_lin, t), (v, torch.ones_like(t)))[1]
    step, of_u = tangents.trig(u(x_lin, t), v, du, t, factor, sd)
    assert torch.allclose(-like(of_u, step) * step, expected, rtol=1e-10, atol=1e-10)
    further = x_lin - like(t, x_lin) * (u(x_lin, t) + 1)  # the end, if u were greater by 1
    assert torch.allclose((cos * x - further) / (sd * sin) - big_f, like(of_u, x).expand_as(x))


@pytest.mark.parametrize("t", [0.25, 0.9])
def test_sampled_velocities_give_the_tangent_in_the_mean(t, monkeypatch):  # T2
    """Before it is normalised, which makes it biased."""
    count, x_t = 200_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, t, count)
    monkeypatch.setattr(tangents, "normalised", lambda g: g)
    at, end = torch.full((count,), t, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    made = Recipe(Config(velocity="data", tangent="linear"), None)
    x, v = x_t.expand(count, 3), noise - data
    du = made.config.slope(exact.FLOW_MAP, x, at, end, v, {})
    step, _ = made.step(exact.FLOW_MAP(x, at, end, {}), v, du, at, 1.0)
    assert (step.mean(0).abs() < 5 * step.std(0) / math.sqrt(count)).all()
    assert step.square().mean().sqrt() > 0.1


def test_the_gradient_is_that_of_the_tangent():
    """d loss / d u = 2 step / d, where the error has weight 1."""
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = loss({"tangent": "linear"}, lambda x, t, s, cond: OTHER(x, t, s, cond) + shift, count=1)
    found.total.backward()
    assert shift.grad.square().sum().item() == pytest.approx(4 / 3 * found.logs["tangent"].item())


def test_the_factor_of_the_derivative_grows_with_the_training():
    def step(warm_up, progress):
        one = torch.ones(1, 1, dtype=torch.float64)
        made = Recipe(Config(tangent="linear", warm_up=warm_up), None)
        return made.step(one, 0 * one, one, torch.ones(1), progress)[0].item()

    for warm_up, progress, factor in (
        (0.5, 0, 0),
        (0.5, 0.25, 0.5),
        (0.5, 0.5, 1),
        (0.5, 0.9, 1),
        (0, 0, 1),
        (None, 0.05, 0.5),
    ):
        assert step(warm_up, progress) == pytest.approx((1 + factor) / (1.1 + factor))


@pytest.mark.parametrize("error", [0.2, 3.0])
def test_the_learned_variance_is_that_of_the_error(error):
    """The loss e / exp(l) + l is least at l = log e. The student's loss is divided by exp(l)."""
    made = Recipe(Config(log_variance="learned"), None)
    head, t = tangents.LogVariance(), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    optimizer, context = (
        torch.optim.LBFGS(head.double().parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0),
        exact.context(50),
    )
    context.carry.update(t=t, error=torch.full((50,), error))

    def closure():
        optimizer.zero_grad()
        found = made.variance_loss({"log_variance": head}, exact.batch(50), context).total
        found.backward()
        return found

    optimizer.step(closure)
    assert head(t).detach().numpy() == pytest.approx(math.log(error), abs=1e-3)
    assert tangents.LogVariance()(t).abs().max() == 0


@pytest.mark.parametrize("weight", ["learned", "with_prior"])
def test_the_learned_variance_sees_the_students_error(weight):
    made, context = Recipe(Config(log_variance=weight), exact.teacher(exact.FIELD)), exact.context(64, progress=1.0)
    nets = exact.nets(made, exact.Given(exact.Network(OTHER)))
    student, head = made.turns(0, 0)
    total = student.loss(nets, exact.batch(64), context).total
    assert head.network == "log_variance"
    assert context.carry["error"].mean().item() == pytest.approx(total.item())  # its logarithm is 0 at first
    assert head.loss(nets, exact.batch(64), context).total.item() == pytest.approx(total.item())


def test_facm_clips_the_tangent_and_steps_less_near_the_data():
    u, zero = torch.tensor([[3.0, -0.2]]), torch.zeros(1, 2)
    for t, part in ((1.0, 1.0), (0.75, 0.5), (0.0, 0.0)):
        assert torch.allclose(tangents.clipped(u, zero, zero, torch.tensor([t])), part * torch.tensor([[1.0, -0.2]]))


def test_facm_anchors_the_velocity_by_length_and_angle():
    """u(x, t, t) = v + b for an exact end: |b|^2 / d + 1 - cos(v + b, v)."""
    shift = torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)

    def network(x_t, t, s, cond):
        return exact.FLOW_MAP(x_t, t, s, cond) + shift * like(s == t, x_t)

    seen = []

    def record(x_t, at, s, cond):
        seen.append((x_t, at))
        return network(x_t, at, s, cond)

    found = loss({**FACM, "anchor": 2.0}, record)
    x, t = seen[0]
    v = exact.FIELD(x, t, {})
    apart = 1 - torch.nn.functional.cosine_similarity(v + shift, v)
    assert found.total.item() == pytest.approx(2 * (0.25 / 3 + apart.mean().item()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tangent": "linear", "sigma_data": 1.0}, "sigma_data has no effect with tangent: linear"),
        ({**FACM, "warm_up": 0.2}, "warm_up: no effect with tangent: clipped"),
        ({**FACM, "log_variance": "learned"}, "log_variance: no effect with tangent: clipped"),
        ({"tangent": "clipped"}, "tangent: clipped needs anchor"),
        ({"warm_up": 0.6}, "less than or equal to 0.5"),
        ({"velocity": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: data"),
        ({"h": 0.1}, "h has no effect with derivative: forward"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**options)


def test_it_needs_what_it_reads():
    assert Config().needs == {"data", "teacher", "jvp"}
    assert Config(velocity="data", derivative="central").needs == {"data"}


SUBJECTS = [
    testing.Subject(
        "consistency/scm",
        ring={"sigma_data": 2.13, "warm_up": 0.5},
        steps=(1, 2),
        frequencies=5,
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            lambda: test_the_tangent_vanishes_at_the_flow_map({}),
            lambda: test_the_tangent_is_that_of_trigflow(2.13, 0.3),
        ),
    ),
]
