"""Recipe alphaflow at its exact solutions (sheet pretrain-tune 2.6): from flow matching of whole jumps to MeanFlow."""

import math
from statistics import NormalDist

import pytest
import torch
from pydantic import ValidationError

from distill import testing
from distill.flow import autodiff, laws
from distill.flow.interpolants import like
from distill.protocols import Batch, Pairs
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher
from recipes.shortcut import meanflow
from recipes.shortcut.alphaflow import Config, Recipe

HALF, LAST = 0.5, 0.8  # progress at which alpha is 1/2, and 0


def loss(network, count=256, batch=None, teacher=None, progress=LAST, recipe=Recipe, config=Config, uniforms=None,
         **options):  # fmt: skip
    made = recipe(config(**options), teacher or exact.teacher(exact.FIELD))
    nets = exact.nets(made, exact.Given(exact.Network(network)))
    (turn,) = made.turns(0, 0)
    context = exact.context(count, progress=progress, uniforms=uniforms)
    return turn.loss(nets, batch or exact.batch(count), context)


def at(alpha):
    """The progress at which alpha has this value."""
    return 0.5 - math.log(alpha / (1 - alpha)) / 25


def velocity(x_t, t, s, cond):
    """A network that does not know its second time: the velocity at x_t."""
    return exact.FIELD(x_t, t, cond)


def test_alpha_is_that_of_the_paper():
    """1 for the first 28.8% of the window, 0 from 71.2% on, 1/2 in its middle."""
    for start, end in ((0.0, 1.0), (0.5, 0.75)):
        config, width = Config(window_start=start, window_end=end), end - start
        assert config.alpha(0.0) == config.alpha(start + 0.287 * width) == 1
        assert config.alpha(1.0) == config.alpha(start + 0.713 * width) == 0
        assert config.alpha(start + 0.5 * width) == pytest.approx(0.5)
        assert config.alpha(start + 0.289 * width) == pytest.approx(0.995, abs=2e-4)
        assert config.alpha(start + 0.711 * width) == pytest.approx(0.005, abs=2e-4)
        assert config.alpha(start + 0.6 * width) == pytest.approx(1 / (1 + math.exp(2.5)))


def test_it_begins_as_flow_matching_of_whole_jumps():  # P08
    """With alpha = 1, u(x_t, t, s) is v(x_t, t), whatever s is."""
    assert loss(velocity, progress=0.0).logs["error"] < 1e-24
    assert loss(exact.FLOW_MAP, progress=0.0).logs["error"] > 1e-3


@pytest.mark.parametrize("options", [{}, {"diagonal": 0.0}, {"clip": 100.0}, {"to_data": 0.5}])
def test_it_ends_as_meanflow(options):  # T1
    assert loss(exact.FLOW_MAP, **options).logs["error"] < 1e-14
    assert loss(velocity, **options).logs["error"] > 1e-3


def test_its_last_loss_is_that_of_meanflow():
    """At any network; the same draws, and c."""
    ours = loss(velocity)
    theirs = loss(velocity, recipe=meanflow.Recipe, config=meanflow.Config, diagonal=0.5)
    assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-6)
    assert ours.logs["error"].item() == pytest.approx(theirs.logs["error"].item(), rel=1e-6)


@pytest.mark.parametrize(("alpha", "gap"), [(1.0, 0.304), (0.5, 0.043), (0.1, 1.0e-3), (0.01, 8.9e-6)])
def test_the_flow_map_is_not_its_solution_before(alpha, gap):  # P08
    """The error for a Gaussian of mean 0.7 and variance 0.3, from 0.9 at t = 0.8 to s = 0.25."""
    mean, std = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64).sqrt()
    point = torch.full((4, 1), 0.9, dtype=torch.float64)
    uniforms = {name: NormalDist().cdf(math.log(time / (1 - time)) + 0.4) for name, time in (("t", 0.8), ("s", 0.25))}
    made = Recipe(Config(diagonal=0.0), exact.teacher(GaussianField(mean, std), (1,)))
    (turn,) = made.turns(0, 0)
    progress = 0.0 if alpha == 1 else at(alpha)
    given = exact.context(4, progress=progress, uniforms=uniforms, normals={"noise": point})  # x_t = data = noise
    nets = {"student": exact.Network(GaussianFlowMap(mean, std))}
    error = turn.loss(nets, Batch(point, None, {}), given).logs["error"].sqrt().item()
    assert error == pytest.approx(gap, rel=0.03)


def test_residuals_by_alpha_become_those_of_meanflow():  # P08
    """At a network that solves neither; the gap is proportional to alpha."""
    x, t, s = exact.batch(64).data, torch.full((64,), 0.9).double(), torch.full((64,), 0.25).double()
    v, recipe = exact.FIELD(x, t, {}), Recipe(Config(), exact.teacher(exact.FIELD))

    def network(x, t, s, cond):
        return torch.sin(x + like(t - 2 * s, x))

    u = network(x, t, s, {})

    def residual(alpha):
        return recipe.target(exact.Network(network), (x, t, s), {}, v, u, alpha) - u

    gaps = [(residual(r) / r - residual(0.0)).square().mean().sqrt().item() for r in (1e-2, 1e-3)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05) and gaps[1] < 5e-3


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_target_mixes_a_step_and_a_jump(alpha):
    """alpha v + (1 - alpha) u(x_m, m, s), clipped."""
    x, t, s = exact.batch(64).data, torch.full((64,), 0.9).double(), torch.full((64,), 0.25).double()
    m, v = t - alpha * (t - s), exact.FIELD(x, t, {})
    expected = alpha * v + (1 - alpha) * velocity(x - like(t - m, x) * v, m, s, {})
    for clip in (None, 0.5):
        recipe = Recipe(Config(clip=clip), exact.teacher(exact.FIELD))
        found = recipe.target(exact.Network(velocity), (x, t, s), {}, v, velocity(x, t, s, {}), alpha)
        assert torch.allclose(found, expected if clip is None else expected.clamp(-0.5, 0.5), atol=1e-12)
    assert expected.abs().max() > 0.5


def test_sampled_velocities_satisfy_it_in_the_mean():  # T2
    """For any alpha: the target of sampled velocities has the mean of that of the marginal velocity."""
    count, x_t = 200_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, 0.7, count)
    t, s = (torch.full((count,), time, dtype=torch.float64) for time in (0.7, 0.2))
    x, recipe = x_t.expand(count, 3), Recipe(Config(velocity="data"), None)
    u, v = exact.FLOW_MAP(x[:1], t[:1], s[:1], {}), exact.FIELD(x[:1], t[:1], {})
    network = exact.Network(exact.FLOW_MAP)
    for alpha in (1.0, 0.3, 0.0):
        target = recipe.target(network, (x, t, s), {}, noise - data, u, alpha)
        expected = recipe.target(network, (x[:1], t[:1], s[:1]), {}, v, u, alpha)[0]
        assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(count)).all()
    assert (expected - u).abs().max() < 1e-11 and target.std(0).max() > 0.3


def test_weights_are_those_of_the_paper():
    """alpha e / (e + c) where s < t, and e / (e + c) where s = t. u is 0, and v is 0.1 everywhere."""
    for progress, alpha in ((0.0, 1.0), (at(0.3), 0.3), (LAST, 1.0)):
        found = loss(lambda x, t, s, cond: 0 * x, batch=Batch(*still(256), {}), progress=progress, velocity="pairs")
        e = 0.01
        assert found.logs["error"].item() == pytest.approx(e * (1 + (alpha if 0 < alpha < 1 else 1) ** 2) / 2, rel=1e-6)
        off = alpha * e * alpha**2 / (e * alpha**2 + 1e-3)
        assert found.total.item() == pytest.approx((off + e / (e + 1e-3)) / 2, rel=1e-6)


def still(count):
    """Pairs with noise - data = 0.1."""
    noise = exact.batch(count).data
    return None, Pairs(noise, noise - 0.1)


def test_the_derivative_is_computed_in_the_last_phase_alone(monkeypatch):
    jvp, stepwise, calls = autodiff.jvp, laws.stepwise, []
    monkeypatch.setattr(autodiff, "jvp", lambda *given: calls.append(("jvp", len(given[1][0]))) or jvp(*given))
    monkeypatch.setattr(laws, "stepwise", lambda *given: calls.append(("step", len(given[1]))) or stepwise(*given))
    for progress in (0.0, HALF, LAST):
        loss(exact.FLOW_MAP, 64, progress=progress)
    assert calls == [("step", 32), ("jvp", 32)]


def test_a_guided_teacher_gives_the_flow_map_of_the_guided_law():  # oracle C
    means, null, scale = torch.stack([exact.MEAN, -exact.MEAN]), 0.5 * exact.MEAN, 2.5
    batch = Batch(exact.batch(64).data, None, {"class_labels": torch.arange(64) % 2})
    guided = torch.cat([null + scale * (means - null), null[None]])
    teacher = class_gaussian_teacher(means, null, exact.STD)
    right, wrong = (
        loss(GaussianFlowMap(rows, exact.STD, conditional=True), 64, batch, teacher, guidance_scale=scale)
        for rows in (guided, torch.cat([means, null[None]]))
    )
    assert right.logs["error"] < 1e-8 and wrong.logs["error"] > 1e-1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_start": 0.5, "window_end": 0.5}, "window_end=0.5 must be above window_start=0.5"),
        ({"sharpness": 5.0}, "sharpness"),
        ({"velocity": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: data; remove it"),
        ({"h": 0.1}, "h has no effect with derivative: forward; remove it, or use derivative: central"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**options)


def test_alpha_reaches_zero_within_any_window():
    assert Config(sharpness=12.0).alpha(0.999) == 0 < Config(sharpness=12.0).alpha(0.9)


def test_what_it_needs():
    assert Config().needs == {"data", "teacher", "jvp"}
    assert Config(velocity="data", derivative="central").needs == {"data"}


SUBJECTS = [
    testing.Subject(
        "shortcut/alphaflow",
        ring={"to_data": 0.25},
        steps=(1, 2, 4),
        frequencies=5,
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            lambda: test_it_ends_as_meanflow({}),
            test_it_begins_as_flow_matching_of_whole_jumps,
            test_residuals_by_alpha_become_those_of_meanflow,
            test_sampled_velocities_satisfy_it_in_the_mean,
        ),
    ),
]
