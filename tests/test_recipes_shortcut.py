"""Recipes shortcut and meanflow at their exact solutions (sheets consistency 5.5 and 6.1)."""

import math

import pytest
import torch
from pydantic import ValidationError

from distill import testing
from distill.flow import autodiff, solvers
from distill.flow.interpolants import like
from distill.protocols import Batch, Pairs
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher
from recipes.shortcut import meanflow, shortcut


def make(module, **options):
    return module.Recipe(module.Config(**options), exact.teacher(exact.FIELD))


def loss(made, network, count=256, batch=None, **context):
    nets = exact.nets(made, exact.Given(exact.Network(network)))
    (turn,) = made.turns(0, 0)
    return turn.loss(nets, batch or exact.batch(count), exact.context(count, **context))


def velocity(x_t, t, s, cond):
    """A network that does not know its second time."""
    return exact.FIELD(x_t, t, cond)


class Composed:
    """The average velocity over t - s of the steps of 1/M by which a solver goes there."""

    def __init__(self, grid, solver):
        self.grid, self.solver = grid, solver

    def __call__(self, x_t, t, s, cond):
        x, at = x_t, t.double()
        for _ in range(self.grid):
            to = torch.maximum(at - 1 / self.grid, s.double())
            x, at = solvers.step(exact.FIELD, x, at, to, cond, self.solver), to
        return (x_t - x) / like((t - s).double(), x)


# --- shortcut ---


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(("base", "solver"), [("velocity", "euler"), ("two_steps", "euler"), ("step", "heun")])
def test_the_optimum_composes_the_steps_of_its_base(base, solver, decay):  # T1b
    made = make(shortcut, base=base, grid=16, target_decay=decay)
    assert loss(made, Composed(16, solver)).total < 1e-24
    assert loss(made, Composed(16, "heun" if solver == "euler" else "euler")).total > 1e-6
    assert loss(made, velocity).total > 1e-3


def test_the_optimum_comes_near_the_flow_map_as_the_grid_is_refined():  # T1b
    x, one, zero = exact.batch(64).data, torch.ones(64), torch.zeros(64)
    gaps = [
        (Composed(m, "euler")(x, one, zero, {}) - exact.FLOW_MAP(x, one, zero, {})).abs().max() for m in (64, 128, 256)
    ]
    for coarse, fine in zip(gaps, gaps[1:], strict=False):
        assert (coarse / fine).item() == pytest.approx(2, abs=0.1)


def test_two_half_steps_of_the_flow_map_are_the_flow_map():  # T1
    made, count = make(shortcut, base="step"), 64
    x_t, t, d = exact.batch(count).data, torch.full((count,), 0.75), torch.full((count,), 0.5)
    target = made.two_half_steps(exact.Network(exact.FLOW_MAP), x_t, t, d, {})
    assert (target - exact.FLOW_MAP(x_t, t, t - d, {})).abs().max() < 1e-12


@pytest.mark.parametrize("t", [0.25, 1.0])
def test_the_finest_step_from_data_is_in_the_mean_the_velocity(t):  # T2
    count, x_t = 100_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, t, count)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    made = make(shortcut, base="data", grid=4, bootstrap=1e-5)
    fixed = {"normals": {"noise": noise}, "uniforms": {"t": t - 1e-3}}
    loss(
        made, lambda x, t, s, cond: velocity(x, t, s, cond) + shift, count, Batch(data, None, {}), **fixed
    ).total.backward()
    assert shift.grad.abs().max() < 2 / 3 * 5 * (noise - data).std(0).max() / math.sqrt(count)


def test_steps_are_those_of_the_paper():
    """Dyadic sizes equally often, times at their multiples, a quarter of the batch; all that jumps will use."""
    count, calls = 4000, []

    def record(x_t, t, s, cond):
        calls.append((t, s))
        return velocity(x_t, t, s, cond)

    loss(make(shortcut, grid=8), record, count)
    (first, to), (second, _), (t, s) = calls
    d = (t - s).double()
    sizes, counts = d.unique(return_counts=True)
    assert sizes.tolist() == [0.125, 0.25, 0.5, 1]
    assert counts[0] == 3000 and ((counts[1:] - 1000 / 3).abs() < 4 * math.sqrt(1000 / 3)).all()
    assert ((t / d) == (t / d).round()).all() and t.min() > 0 and t.max() == 1
    assert torch.equal(first - to, (d[d > 0.125] / 2).float()) and torch.equal(first - second, first - to)


def test_the_teacher_is_asked_about_the_finest_steps_alone():
    asked = []

    def field(x_t, t, cond):
        asked.append(len(x_t))
        return exact.FIELD(x_t, t, cond)

    field.interpolant, field.t_range = exact.FIELD.interpolant, (0.0, 1.0)
    for base, expected in (("velocity", [48]), ("step", [48, 48]), ("two_steps", [48, 16, 16])):
        asked.clear()
        loss(shortcut.Recipe(shortcut.Config(base=base), exact.teacher(field)), exact.FLOW_MAP, 64)
        assert asked == expected


# --- meanflow ---


@pytest.mark.parametrize("options", [{}, {"diagonal": 0.0, "power": 0.0}, {"mu": 1.0, "sigma": 2.0}])
def test_the_identity_holds_at_the_flow_map(options):  # T1
    assert loss(make(meanflow, **options), exact.FLOW_MAP).logs["error"] < 1e-14  # times are float32
    assert loss(make(meanflow, **options), velocity).logs["error"] > 1e-3


def test_central_differences_do_as_well():
    assert loss(make(meanflow, derivative="central"), exact.FLOW_MAP).logs["error"] < 1e-6


@pytest.mark.parametrize(("t", "s"), [(0.6, 0.2), (0.9, 0.9)])
def test_sampled_velocities_satisfy_the_identity_in_the_mean(t, s):  # T2
    count, x_t = 200_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, t, count)
    at, to = (torch.full((count,), time, dtype=torch.float64) for time in (t, s))
    made, network = make(meanflow, velocity="data"), exact.Network(exact.FLOW_MAP)
    target = made.target(
        network, x_t.expand(count, 3), at, to, noise - data, Batch(data, None, {}), torch.arange(count)
    )
    expected = exact.FLOW_MAP(x_t[None], at[:1], to[:1], {})[0]
    assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(count)).all()
    assert (target - expected).square().mean().sqrt() > 0.3  # one sample is far from it


def test_a_predicted_tangent_gives_the_same_mean_by_a_derivative_that_is_not_random():  # P06
    """At a flow map that is not that of the data, but whose velocity at s = t is the marginal one."""
    count, x_t, t, s = 100_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64), 0.7, 0.2
    data, noise = exact.posterior(x_t, t, count)
    at, to = (torch.full((count,), time, dtype=torch.float64) for time in (t, s))

    def network(x, t, s, cond):
        return exact.FIELD(x, t, cond) + like(t - s, x) * torch.sin(3 * x)

    found = {}
    for tangent in ("sampled", "predicted"):
        made = make(meanflow, velocity="data", tangent=tangent)
        given = x_t.expand(count, 3), at, to, noise - data, Batch(data, None, {}), torch.arange(count)
        found[tangent] = made.target(exact.Network(network), *given)
    apart = found["sampled"] - found["predicted"]
    assert (apart.mean(0).abs() < 5 * apart.std(0) / math.sqrt(count)).all() and apart.std(0).max() > 0.1
    assert torch.allclose(found["predicted"].var(0), (noise - data).var(0)), "the derivative is not random"


@pytest.mark.parametrize("tangent", ["sampled", "predicted"])
def test_on_pairs_of_a_straight_flow_its_map_has_no_loss(tangent):
    """Re-MeanFlow: noise - data is then the velocity itself."""
    noise = exact.batch(64, seed=5).data
    batch = Batch(None, Pairs(noise, exact.MEAN + exact.STD * noise), {})
    made = make(meanflow, velocity="pairs", tangent=tangent)
    right = loss(made, lambda x, t, s, cond: exact.STRAIGHT(x, t, cond), batch=batch, count=64)
    assert right.logs["error"] < 1e-12 < 1e-2 < loss(made, exact.FLOW_MAP, batch=batch, count=64).logs["error"]
    assert made.config.needs == {"teacher", "pairs", "jvp"}


def test_the_weight_leaves_the_direction_of_a_samples_gradient():
    """1 / (error + c)^p, stopped: the gradient is weight times that of the square."""
    gradients = {}
    for power in (0.0, 0.5, 1.0):
        shift = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
        found = loss(
            make(meanflow, power=power, diagonal=0.0),
            lambda x, t, s, cond, by=shift: exact.FLOW_MAP(x, t, s, cond) + by,
            1,
        )
        found.total.backward()
        gradients[power] = shift.grad.item() * (found.logs["error"].item() + 1e-3) ** power
    assert gradients[0.5] == pytest.approx(gradients[0.0]) and gradients[1.0] == pytest.approx(gradients[0.0])


def test_only_rows_off_the_diagonal_are_differentiated(monkeypatch):
    jvp, rows = autodiff.jvp, []

    def count(function, at, along):
        rows.append(len(at[0]))
        return jvp(function, at, along)

    monkeypatch.setattr(autodiff, "jvp", count)
    loss(make(meanflow), exact.FLOW_MAP, 64)
    assert rows == [16]


def test_times_are_those_asked_for():
    def seen(**options):
        calls = []

        def record(x_t, t, s, cond):
            calls.append((t, s))
            return velocity(x_t, t, s, cond)

        loss(make(meanflow, derivative="central", **options), record, 4000)
        return calls[-1]

    t, s = seen()
    assert (s <= t).all() and ((s == t).sum() == 3000) and not (s == 0).any()
    assert t.logit().mean() > -0.4  # the later of two
    t, s = seen(time_law="uniform", diagonal=0.0, to_data=0.5)
    assert ((s == 0).sum() - 2000).abs() < 4 * math.sqrt(1000)
    assert (t.square().mean() - 0.5).abs() < 0.03  # the later of two uniform ones has density 2 t
    assert t.max() <= 1 and t.min() > 0


def test_differences_stay_between_s_and_the_noise():
    """A little earlier on the path where t + h lies beyond t = 1, and over less where t - s is less than 2 h."""
    made, times = make(meanflow, derivative="central", h=0.1, diagonal=0.0, time_law="uniform"), []

    def record(x_t, t, s, cond):
        times.append((t, s))
        return exact.FLOW_MAP(x_t, t, s, cond)

    assert loss(made, record, 4000).logs["error"] < 0.02
    t, s = (torch.cat(each) for each in zip(*times, strict=True))
    assert t.max() <= 1 + 1e-6 < t.max() + 0.01 and t.min() >= 0
    assert (t - s).min() > -2e-4  # the least h is 1e-4
    (forth, _), (back, _), (called, to) = times  # two calls for the difference, one with gradients
    assert ((forth - back) / 2).max() == pytest.approx(0.1, abs=1e-6)
    h = ((called - to) / 2).clamp(1e-4, 0.1)
    assert torch.allclose((forth + back) / 2, torch.maximum(torch.minimum(called, 1 - h), h), atol=1e-6)


# --- both ---


@pytest.mark.parametrize(("module", "options"), [(meanflow, {}), (shortcut, {"base": "step", "grid": 256})])
def test_a_guided_teacher_gives_the_flow_map_of_the_guided_law(module, options):  # oracle C
    means = torch.stack([exact.MEAN, -exact.MEAN])
    null, scale = 0.5 * exact.MEAN, 2.5
    batch = Batch(exact.batch(64).data, None, {"class_labels": torch.arange(64) % 2})
    made = module.Recipe(module.Config(guidance_scale=scale, **options), class_gaussian_teacher(means, null, exact.STD))
    guided = torch.cat([null + scale * (means - null), null[None]])
    right, wrong = (
        GaussianFlowMap(rows, exact.STD, conditional=True) for rows in (guided, torch.cat([means, null[None]]))
    )
    errors = [found.logs.get("error", found.total) for found in (loss(made, m, 64, batch) for m in (right, wrong))]
    assert errors[0] < 1e-8 and errors[1] > 1e-1


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (meanflow, {"velocity": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: data"),
        (
            meanflow,
            {"tangent": "predicted"},
            "tangent: predicted replaces sampled velocities; use it with velocity: data",
        ),
        (meanflow, {"velocity": "pairs", "guidance_scale": 2.0}, "guidance_scale has no effect with velocity: pairs"),
        (meanflow, {"power": 0.0, "c": 0.1}, "c has no effect with power: 0; remove it"),
        (meanflow, {"h": 0.1}, "h has no effect with derivative: forward; remove it, or use derivative: central"),
        (meanflow, {"time_law": "uniform", "mu": 0.0}, "mu: no effect with time_law: uniform; remove"),
        (shortcut, {"grid": 12}, "grid: 12 is not a power of two; valid: 2, 4, 8, ..."),
        (shortcut, {"grid": 1}, "grid: 1 is not a power of two"),
        (shortcut, {"base": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with base: data; remove it"),
    ],
)
def test_options_without_effect_are_refused(module, options, message):
    with pytest.raises(ValidationError) as caught:
        module.Config(**options)
    assert message in str(caught.value)


def test_what_they_need():
    assert meanflow.Config().needs == {"data", "teacher", "jvp"}
    assert meanflow.Config(velocity="data", derivative="central").needs == {"data"}
    assert shortcut.Config().needs == {"data", "teacher"} and shortcut.Config(base="data").needs == {"data"}
    assert {meanflow.Recipe.sampler, shortcut.Recipe.sampler} == {"jump"}


SUBJECTS = [
    testing.Subject(
        "shortcut/shortcut",
        ring={"target_decay": 0.99},
        steps=(1, 2),
        closed_form=(
            lambda: test_the_optimum_composes_the_steps_of_its_base("velocity", "euler", None),
            lambda: test_the_optimum_composes_the_steps_of_its_base("step", "heun", None),
            test_the_optimum_comes_near_the_flow_map_as_the_grid_is_refined,
            test_two_half_steps_of_the_flow_map_are_the_flow_map,
            lambda: test_the_finest_step_from_data_is_in_the_mean_the_velocity(0.25),
        ),
    ),
    testing.Subject(
        "shortcut/meanflow",
        ring={"velocity": "data", "diagonal": 0.5, "to_data": 0.1},
        steps=(1, 2),
        short=testing.Training(512_000, lr=1e-3),
        long=testing.Training(2_500_000, lr=1e-3),
        closed_form=(
            lambda: test_the_identity_holds_at_the_flow_map({}),
            lambda: test_sampled_velocities_satisfy_the_identity_in_the_mean(0.6, 0.2),
        ),
    ),
]
