"""Recipe flow_map at its exact solution (sheets consistency 6.3 and 6.4, pretrain-tune 2.8): each law of a flow map."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.flow import laws
from distill.flow.interpolants import like
from distill.protocols import Batch
from distill.testing import exact
from recipes.shortcut.flow_map import Config, Recipe

LAWS = ["lagrangian", "eulerian", "progressive"]


def field(x_t, t, cond):
    return exact.FIELD(x_t, t, cond)


def velocity(x_t, t, s, cond):
    """Right at s = t, and no flow map."""
    return exact.FIELD(x_t, t, cond)


def loss(network, count=64, batch=None, context=None, **options):
    made = Recipe(Config(**options), exact.teacher(exact.FIELD))
    nets = exact.nets(made, exact.Given(exact.Network(network)))
    (turn,) = made.turns(0, 0)
    return turn.loss(nets, batch or exact.batch(count), context or exact.context(count))


OPTIONS = [{"law": law, "normalise": short} for law in LAWS for short in (False, True)]
OPTIONS += [{"law": law, "gradient": "full"} for law in LAWS[:2]] + [{"law": "progressive", "middle": "uniform"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_flow_map_satisfies_each_law(options):  # T1
    assert loss(exact.FLOW_MAP, **options).total < 1e-10  # times are float32
    assert loss(velocity, **options).total > 1e-3


@pytest.mark.parametrize("law", LAWS)
def test_the_right_side_is_u_at_any_times(law):
    x, t = exact.batch(32).data, torch.linspace(0.1, 1, 32, dtype=torch.float64)
    for part in (0.0, 0.4, 0.99):
        s = part * t
        u = exact.FLOW_MAP(x, t, s, {})
        if law == "progressive":
            right = laws.progressive(exact.FLOW_MAP, x, t, s, {}, torch.linspace(0.05, 0.95, 32, dtype=torch.float64))
        else:
            right = getattr(laws, law)(exact.FLOW_MAP, x, t, s, {}, field, gradient=False)
        assert (right - u).abs().max() < 1e-11


@pytest.mark.parametrize("law", LAWS)
def test_the_students_own_velocity_makes_its_targets(law):
    """With u = v + b at s = t, the laws ask for the flow map of v + b, which a constant b leaves in place."""
    still = torch.zeros(3, dtype=torch.float64)  # x_t does not move

    def resting(x_t, t, s, cond):
        return still.expand_as(x_t)

    found = loss(resting, law=law, velocity="self")
    assert found.total.item() == pytest.approx(0.25 * found.logs["on_diagonal"].item()), "no other loss"
    assert found.total > 0.1, "but that velocity is not that of the data"


def test_the_velocity_of_the_data_is_learned_at_equal_times():  # T2
    """The gradient at s = t vanishes in the mean for the velocity of the law."""
    count, x_t, t = 200_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64), 0.5
    data, noise = exact.posterior(x_t, t, count)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fixed = {"normals": {"noise": noise}, "uniforms": {"gap": 0.5, "s": (t - G) / (1 - G)}}
    found = loss(
        lambda x, t, s, cond: velocity(x, t, s, cond) + shift * like((s == t).double(), x),
        law="progressive",
        velocity="self",
        diagonal=0.999,
        batch=Batch(data, None, {}),
        context=exact.context(count, **fixed),
    )
    found.total.backward()
    assert shift.grad.abs().max() < 2 / 3 * 5 * (noise - data).std(0).max() / math.sqrt(count)


G = torch.sigmoid(torch.tensor(-0.8)).item()  # the gap at the median of its law


class Scaled(nn.Module):
    """a x + b s: the derivative in s is b."""

    interpolant, t_range = exact.Network.interpolant, (0.0, 1.0)

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.3, 0.7))

    def forward(self, x_t, t, s, cond):
        return self.a * x_t + self.b * like(s, x_t).double()


@pytest.mark.parametrize("law", ["lagrangian", "eulerian"])
@pytest.mark.parametrize("gradient", ["semi", "full"])
def test_full_gradients_also_flow_through_the_derivative(law, gradient):
    """Against the derivative of the loss by differences, with only what has a gradient varied."""
    context, batch = exact.context(64), exact.batch(64)

    def total(network, frozen):
        """The loss, where `frozen` stands for the student wherever no gradient may flow."""
        made = Recipe(Config(law=law, gradient=gradient), exact.teacher(exact.FIELD))
        with pytest.MonkeyPatch.context() as patch:
            if gradient == "semi":
                law_of = getattr(laws, law)
                patch.setattr(laws, law, lambda u, *rest, **more: law_of(frozen, *rest, **more))
            elif law == "lagrangian":
                whole = laws.lagrangian

                def landing_frozen(u, x, t, s, cond, velocity, *, gradient):
                    end = velocity(x + like(s - t, x) * frozen(x, t, s, cond), s, cond).detach()
                    moved = velocity(x + like(s - t, x) * u(x, t, s, cond), s, cond).detach()
                    return whole(u, x, t, s, cond, velocity, gradient=gradient) - moved + end

                patch.setattr(laws, law, landing_frozen)
            (turn,) = made.turns(0, 0)
            return turn.loss({"student": network}, batch, context).total

    network, frozen = Scaled(), Scaled()
    total(network, frozen).backward()
    for name in ("a", "b"):
        ends = []
        for sign in (1, -1):
            other = Scaled()
            getattr(other, name).data += sign * 1e-5
            ends.append(total(other, frozen).item())
        assert getattr(network, name).grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_times_are_those_of_align_your_flow():
    """The gap is logit-normal, s uniform on the rest; a part jumps to data, a part does not move."""
    seen = []

    def record(x_t, t, s, cond):
        seen.append((t, s))
        return velocity(x_t, t, s, cond)

    loss(record, 40_000, law="progressive", diagonal=0.5, to_data=0.3)
    t, s = seen[-1]
    assert ((s >= 0) & (s <= t) & (t <= 1)).all()
    still, home = s == t, (s == 0) & (t > 0)
    assert still.float().mean() == 0.5
    assert home.float().mean().item() == pytest.approx(0.15, abs=0.01)
    moving = ~still & ~home
    gap = (t - s)[moving].double()
    assert gap.logit().mean().item() == pytest.approx(-0.8, abs=0.02)
    assert gap.logit().std().item() == pytest.approx(1, abs=0.02)
    rest = (s[moving].double() / (1 - gap)).clamp(0, 1)
    assert rest.mean().item() == pytest.approx(0.5, abs=0.01) and rest.std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "self", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: self; remove it"),
        ({"law": "progressive", "gradient": "full"}, "gradient: full has no effect on law: progressive"),
        ({"normalise": True, "gradient": "full"}, "normalise has no effect with gradient: full"),
        ({"middle": "uniform"}, "middle has no effect on law: lagrangian"),
        ({"target_decay": 0.9}, "target_decay has no effect with velocity: teacher"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**options)


SUBJECTS = [
    testing.Subject(
        "shortcut/flow_map",
        steps=(1, 2),
        frequencies=5,
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            lambda: test_the_flow_map_satisfies_each_law({"law": "lagrangian"}),
            lambda: test_the_right_side_is_u_at_any_times("eulerian"),
        ),
    ),
]
