"""Recipe soflow at its exact solution (sheet pretrain-tune 2.7): jumps that start later end at the same point."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.flow import laws
from distill.flow.interpolants import like
from distill.protocols import Batch, Pairs
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher
from recipes.shortcut.soflow import Config, Recipe

X_T = torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)


def loss(network, count=256, batch=None, teacher=None, context=None, **options):
    made = Recipe(Config(**options), teacher or exact.teacher(exact.FIELD))
    nets = exact.nets(made, exact.Given(network if isinstance(network, nn.Module) else exact.Network(network)))
    (turn,) = made.turns(0, 0)
    return turn.loss(nets, batch or exact.batch(count), context or exact.context(count))


def steps(r):
    return {"first_step": r, "last_step": r}


def velocity(x_t, t, s, cond):
    """A network that does not know its second time."""
    return exact.FIELD(x_t, t, cond)


def times(count, *values):
    return (torch.full((count,), value, dtype=torch.float64) for value in values)


def test_the_error_of_the_flow_map_is_of_the_order_of_the_step():  # T1
    """A step of the exact velocity is an Euler step."""
    x, (t, s) = exact.batch(64).data, times(64, 0.9, 0.25)
    u = exact.FLOW_MAP(x, t, s, {})
    gaps = [
        (laws.stepwise(exact.FLOW_MAP, x, t, s, {}, exact.FIELD(x, t, {}), r) - u).square().mean().sqrt().item()
        for r in (0.02, 0.01, 0.005, 0.0025)
    ]
    for coarse, fine in pairwise(gaps):
        assert coarse / fine == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("r", "gap"), [(1.0, 0.304), (0.5, 0.043), (0.1, 1.0e-3), (0.01, 8.9e-6)])
def test_the_error_is_known_for_a_gaussian(r, gap):
    """Of mean 0.7 and variance 0.3, from 0.9 at t = 0.8 to s = 0.25; the values are of r times the error."""
    mean, std = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64).sqrt()
    field, flow_map = GaussianField(mean, std), GaussianFlowMap(mean, std)
    x, (t, s) = torch.tensor([[0.9]], dtype=torch.float64), times(1, 0.8, 0.25)
    found = laws.stepwise(flow_map, x, t, s, {}, field(x, t, {}), r) - flow_map(x, t, s, {})
    assert r * found.abs().item() == pytest.approx(gap, rel=0.03)


def test_the_loss_of_the_flow_map_vanishes_with_the_step():
    found = [loss(exact.FLOW_MAP, **steps(r)).logs["error"] for r in (0.1, 0.02)]
    assert found[1] < 1e-4 and found[0] / found[1] > 20
    assert loss(velocity, **steps(0.02)).logs["error"] > 1e-2


@pytest.mark.parametrize("r", [1.0, 0.1, 0.002])
def test_on_pairs_of_a_straight_flow_its_map_has_no_loss(r):
    """Steps of a straight path are exact, however long."""
    noise = exact.batch(64, seed=5).data
    batch = Batch(None, Pairs(noise, exact.MEAN + exact.STD * noise), {})
    options = {"velocity": "pairs", **steps(r)}
    assert loss(lambda x, t, s, cond: exact.STRAIGHT(x, t, cond), 64, batch, **options).logs["error"] < 1e-9
    assert loss(exact.FLOW_MAP, 64, batch, **options).logs["error"] > 1e-2
    assert Config(**options).needs == {"teacher", "pairs"}


def test_sampled_velocities_satisfy_the_law_in_the_mean():  # T2
    count = 200_000
    data, noise = exact.posterior(X_T, 0.7, count)
    x, (t, s) = X_T.expand(count, 3), times(count, 0.7, 0.2)
    target = laws.stepwise(exact.FLOW_MAP, x, t, s, {}, noise - data, 0.01)
    expected = laws.stepwise(exact.FLOW_MAP, x[:1], t[:1], s[:1], {}, exact.FIELD(x[:1], t[:1], {}), 0.01)[0]
    assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(count)).all()
    assert (target - expected).square().mean().sqrt() > 0.3  # one sample is far from it
    assert (expected - exact.FLOW_MAP(x[:1], t[:1], s[:1], {})).abs().max() < 0.02


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_the_gradient_is_that_of_the_distance_of_two_ends(power):  # P09
    """Of w |f(x_t, t, s) - f(x_m, m, s)|^2 / (2 (t - m) (t - s)), with a mean over elements, as the paper has it."""
    count, r, batch, seen = 32, 0.1, exact.batch(32), []
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)

    def network(x, t, s, cond):
        seen.append((x.detach(), t.double(), s.double()))
        return exact.FLOW_MAP(x, t, s, cond) + weight * torch.sin(2 * x + like(3 * t - s, x).double())

    options = {"power": power, "diagonal": 0.0, **steps(r), **({"c": 0.05} if power else {})}
    loss(network, count, batch, **options).total.backward()
    (x_m, m, _), (x_t, t, s) = seen[1], seen[2]

    def end(x, at):
        return x + like(s - at, x) * network(x, at, s, {})

    difference = end(x_t, t) - end(x_m, m).detach()
    q = difference.detach() / like(t - m, x_t)
    w = (q.square().mean(1) + 0.05) ** -power
    expected = (w * difference.square().mean(1) / (2 * (t - m) * (t - s))).mean()
    assert torch.allclose(weight.grad, torch.autograd.grad(expected, weight)[0], rtol=1e-6)
    assert weight.grad.abs().min() > 1e-3


def test_flow_matching_is_weighted_by_its_own_error():
    """On the diagonal the loss is error / (error + c), here of a velocity that is 0.1 off."""
    found = loss(lambda x, t, s, cond: velocity(x, t, s, cond) + 0.1 * like((s == t).double(), x), diagonal=0.999,
                 count=1000, **steps(1.0))  # fmt: skip
    assert found.total.item() == pytest.approx(0.999 * 0.01 / (0.01 + 0.01), abs=2e-3)


def test_steps_become_shorter_during_training():
    """From 0.1 to 0.002, exponentially: 0.0141 at half."""

    def at(progress, **options):
        seen = []

        def record(x_t, t, s, cond):
            seen.append((t, s))
            return velocity(x_t, t, s, cond)

        loss(record, context=exact.context(256, progress=progress), **options)
        (t, s), (m, _), _ = seen
        apart = t - s > 0.1
        return ((t - m) / (t - s))[apart].double()

    for progress, expected in ((0.0, 0.1), (0.5, math.sqrt(0.1 * 0.002)), (1.0, 0.002)):
        assert torch.allclose(at(progress), torch.tensor(expected).double(), rtol=2e-3)
    assert torch.allclose(at(0.5, first_step=1.0, last_step=1.0), torch.tensor(1.0).double())


def test_times_are_those_of_the_paper():
    seen = []

    def record(x_t, t, s, cond):
        seen.append((t, s))
        return velocity(x_t, t, s, cond)

    loss(record, 40_000, diagonal=0.5, to_data=0.3)
    t, s = (each.double() for each in seen[-1])
    still, home = s == t, s == 0
    assert still.double().mean() == 0.5 and home.double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert t[still].logit().mean().item() == pytest.approx(-0.2, abs=0.02)
    assert t[still].logit().std().item() == pytest.approx(1.0, abs=0.02)
    assert t[home].logit().mean().item() == pytest.approx(0.2, abs=0.03), "s = 0 is below any t"
    assert t[home].logit().std().item() == pytest.approx(0.8, abs=0.03)
    both = torch.cat([each[~still & ~home].logit() for each in (t, s)])
    assert both.mean().item() == pytest.approx(-0.4, abs=0.02), "the mean of 0.2 and -1"
    assert (t - s)[~still].min() > 0.99e-4


def test_a_guided_teacher_gives_the_flow_map_of_the_guided_law():  # oracle C
    means, null, scale = torch.stack([exact.MEAN, -exact.MEAN]), 0.5 * exact.MEAN, 2.5
    batch = Batch(exact.batch(64).data, None, {"class_labels": torch.arange(64) % 2})
    guided = torch.cat([null + scale * (means - null), null[None]])
    errors = [
        loss(
            GaussianFlowMap(rows, exact.STD, conditional=True), 64, batch,
            class_gaussian_teacher(means, null, exact.STD), guidance_scale=scale, **steps(0.01)
        ).logs["error"]
        for rows in (guided, torch.cat([means, null[None]]))
    ]  # fmt: skip
    assert errors[0] < 1e-4 and errors[1] > 1e-1


def test_short_steps_are_computed_in_float32_and_without_dropout():
    """The difference of two outputs is divided by the step, and so would be what rounding and dropout make of them."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x, t, s, cond):
            return self.dropout(self.line(x))

    network, x = Dropping(), exact.batch(256).data.float()
    t, s = torch.full((256,), 0.8), torch.full((256,), 0.1)
    zero = torch.zeros_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(laws.stepwise(network, x, t, s, {}, zero, 0.002), zero), "x_m = x: the same output"
    v = torch.ones_like(x)
    plain = laws.stepwise(network.eval(), x, t, s, {}, v, 0.002)
    assert torch.equal(laws.stepwise(network.train(), x, t, s, {}, v, 0.002), plain)
    assert all(each.training for each in network.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(laws.stepwise(network, x, t, s, {}, v, 0.002), plain)
    slope = network.line.weight.detach() @ torch.ones(3)
    assert torch.allclose(plain, v - (0.7 - 0.0014) * slope, atol=2e-4)


def test_shortest_steps_end_before_the_jump():
    """A step is 1e-4 long where r (t - s) is less, but never longer than the jump."""
    seen = []

    def record(x, t, s, cond):
        seen.append(t)
        return x

    t, s = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.4, 0.499, 0.49995, 0.5])
    x = torch.ones(4, 1)
    found = laws.stepwise(record, x, t, s, {}, x, 0.01)
    assert torch.allclose(seen[0] - seen[1], torch.tensor([1e-3, 1e-4, 5e-5, 0.0]), atol=1e-7)
    assert torch.allclose(found[:, 0], torch.tensor([1 - 0.099, 1 - 0.0009, 1.0, 1.0]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: data; remove it"),
        ({"first_step": 0.001}, "last_step=0.002 is above first_step=0.001; steps become shorter"),
        ({"power": 0.0, "c": 0.1}, "c has no effect with power: 0; remove it"),
        ({"diagonal": 0.0, "diagonal_mu": 0.0}, "diagonal_mu: no effect with diagonal: 0; remove them"),
        ({"to_data": 1.0, "s_sigma": 1.0}, "s_sigma: no effect with to_data: 1, where s = 0; remove them"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**options)


def test_what_it_needs():
    assert Config().needs == {"data", "teacher"} and Config(velocity="data").needs == {"data"}


SUBJECTS = [
    testing.Subject(
        "shortcut/soflow",
        ring={"diagonal": 0.5, "to_data": 0.25},
        steps=(1, 2, 4),
        frequencies=5,
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            test_the_error_of_the_flow_map_is_of_the_order_of_the_step,
            test_sampled_velocities_satisfy_the_law_in_the_mean,
            lambda: test_the_gradient_is_that_of_the_distance_of_two_ends(1.0),
        ),
    ),
]
