"""Recipes flow_matching, reflow and one_step at their exact solutions (reflow sheet T06, T07), for Gaussian data."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.core.errors import InputError
from distill.flow import draws, times
from distill.flow.draws import Rows, StepDraw
from distill.flow.interpolants import like, linear
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Frozen, Pairs, Trained
from distill.spec.model import GaussianTeacher
from distill.students.samplers import euler
from distill.teachers.analytic import GaussianField, gaussian_teacher
from distill.testing import exact
from distill.training.engine import StepContext
from recipes.pretrain import flow_matching
from recipes.reflow import one_step, reflow

M, LAMBDA = 0.7, 0.3
ROOT = math.sqrt(LAMBDA)
STRAIGHT = exact.straight(M, ROOT)
ORACLE = GaussianField(torch.tensor([M], dtype=torch.float64), torch.tensor([ROOT], dtype=torch.float64))
SHAPES = [(32, 3, 32, 32), (1, 2), (7, 3)]


class Student(nn.Module):
    """A velocity field of the linear path from a function; remembers what it was called with."""

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, t, cond):
        self.seen = x_t, t, cond
        return self.function(x_t, t)


class Affine(Student):
    """intercept + slope x_t, whose exact least-squares fit one Newton step finds."""

    def __init__(self):
        super().__init__(lambda x_t, t: self.parameter[0] + self.parameter[1] * x_t)
        self.parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def given(network, num_classes=10):
    return exact.Given(network, num_classes=num_classes)


def v1(x, t):
    """E[noise - data | x_t = x]."""
    return ORACLE(x, t, {})


def v2(x, t):
    """The velocity of the straight paths from noise to m + sqrt(lambda) noise."""
    return STRAIGHT(x, t, {})


def target(noise):
    """T(noise), the end of the oracle's ODE."""
    return M + ROOT * noise


def oracle_pairs(shape):
    noise = torch.randn(shape, generator=draws.generator("pairs"), dtype=torch.float64)
    return Batch(data=None, pairs=Pairs(noise, target(noise)), cond={})


def oracle_data(shape, seed=7):
    latent = torch.randn(shape, generator=draws.generator("oracle", seed), dtype=torch.float64)
    return Batch(data=target(latent), pairs=None, cond={})


def context(rows, step=3, u=None):
    draw = StepDraw(0, step, 0, rows if isinstance(rows, Rows) else Rows(0, rows, rows))
    every = dict.fromkeys(("t", "real_t", "dropped"), u) if u is not None else {}
    return StepContext(step, 0, exact.Draws(draw, {}, every), {})


def loss(module, options, student, batch, ctx, **nets):
    recipe = module.Recipe(module.Config(**options), None)
    recipe.networks(given(student))
    turns = list(recipe.turns(0, 0))
    assert [turn.network for turn in turns] == ["student"]
    return turns[0].loss({"student": student, **nets}, batch, ctx).total


def fit(module, options, batch, u):
    """(intercept, slope) of the affine student that minimises the recipe's loss at the time of the draw u."""
    student, rows = Affine(), len(batch.data if batch.pairs is None else batch.pairs.data)

    def of(parameter):
        student.function = lambda x_t, t: parameter[0] + parameter[1] * x_t
        return loss(module, options, student, batch, context(rows, u=u))

    start = torch.zeros(2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(of, start)
    gradient = torch.autograd.functional.jacobian(of, start)
    return torch.linalg.solve(hessian, -gradient)


def coefficients(field, t):
    """(intercept, slope) of a field that is affine in x."""
    at = torch.full((1,), t, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    return torch.stack([field(zero, at).squeeze(), (field(one, at) - field(zero, at)).squeeze()])


# --- flow matching ---


@pytest.mark.parametrize("t", [0.125, 0.5, 0.875])
def test_flow_matching_regresses_to_the_velocity_of_the_marginals(t):
    count = 200_000
    fitted = fit(flow_matching, {}, oracle_data((count, 1)), t)
    variance = LAMBDA / ((1 - t) ** 2 * LAMBDA + t**2)  # of v given x_t, and the square of 1/std(x_t) is at most 10
    assert (fitted - coefficients(v1, t)).abs().max() < 5 * math.sqrt(10 * variance / count)


def test_flow_matching_gradient_is_zero_in_the_mean_at_the_exact_field_only():
    def gradients(field):
        """Of the loss along 1, x, t, x t, for each of many batches."""
        out = []
        for step in range(48):
            direction = torch.zeros(4, dtype=torch.float64, requires_grad=True)

            def moved(x, t, direction=direction):
                at = like(t, x)
                return field(x, t) + direction[0] + direction[1] * x + direction[2] * at + direction[3] * at * x

            batch = oracle_data((4096, 1), seed=100 + step)
            loss(flow_matching, {}, Student(moved), batch, context(4096, step)).backward()
            out.append(direction.grad)
        gradient = torch.stack(out)
        return gradient.mean(0) / (gradient.std(0) / math.sqrt(len(gradient)))  # in standard errors

    assert gradients(v1).abs().max() < 4
    assert gradients(v2).abs().max() > 40


def test_flow_matching_law_of_times():
    seen = {}
    for name, options in {"u": {}, "ln": {"time_law": "logit_normal", "mu": -1.2, "sigma": 1.2}}.items():
        student = Student(v1)
        loss(flow_matching, options, student, oracle_data((20_000, 1)), context(20_000))
        seen[name] = student.seen[1].double()
    assert seen["u"].mean().item() == pytest.approx(0.5, abs=0.01)
    logits = seen["ln"].logit()
    assert logits.mean().item() == pytest.approx(-1.2, abs=0.04) and logits.std().item() == pytest.approx(1.2, abs=0.04)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_flow_matching_drops_labels_as_often_as_it_says(probability):
    count = 20_000
    labels = draws.sample_labels(range(count), 10)
    batch = Batch(data=oracle_data((count, 1)).data, pairs=None, cond={"class_labels": labels})
    student = Student(v1)
    loss(flow_matching, {"label_dropout": probability}, student, batch, context(count))
    seen = student.seen[2]["class_labels"]
    dropped = seen == 10
    assert torch.equal(seen[~dropped], labels[~dropped])
    tolerance = 4 * math.sqrt(probability * (1 - probability) / count)
    assert dropped.double().mean().item() == pytest.approx(probability, abs=tolerance)


def test_flow_matching_without_dropout_asks_for_no_unconditional_call():
    class Given(exact.Given):
        def null(self, cond):
            raise InputError("the network has no class id for the unconditional call")

    recipe, labels = flow_matching.Recipe(flow_matching.Config(label_dropout=0), None), torch.arange(4)
    roles = recipe.networks(Given(Student(v1), num_classes=10))
    batch = Batch(data=oracle_data((4, 2)).data, pairs=None, cond={"class_labels": labels})
    student = roles["student"].module
    recipe.loss({"student": student}, batch, context(4))
    assert torch.equal(student.seen[2]["class_labels"], labels)


def test_flow_matching_leaves_an_unconditional_network_alone():
    student = Student(v1)
    loss(flow_matching, {}, student, oracle_data((4, 2)), context(4))
    assert student.seen[2] == {}


# --- reflow ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("law", ["uniform", "u_shaped", "exp10", "logit_normal"])
def test_reflow_loss_is_zero_at_the_straight_field_only(shape, distance, law):
    options, batch = {"distance": distance, "time_law": law}, oracle_pairs(shape)
    assert loss(reflow, options, Student(v2), batch, context(shape[0])) < 1e-12  # T07
    assert loss(reflow, options, Student(v1), batch, context(shape[0])) > 1e-3


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.9375])
def test_one_round_of_reflow_recovers_the_straight_field(u):
    """T06: the pairs are deterministic and v2 is affine, so the fit is exact, not only to 2/sqrt(B)."""
    fitted = fit(reflow, {}, oracle_pairs((64, 1)), u)
    assert (fitted - coefficients(v2, u)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("law", "shape"), [("uniform", {}), ("u_shaped", {}), ("exp10", {}), ("logit_normal", {"mu": 1.0, "sigma": 0.5})]
)
def test_reflow_law_of_times_is_the_one_named(law, shape):
    """The laws themselves: test_times.py."""
    student, batch, ctx = Student(v2), oracle_pairs((64, 1)), context(64)
    loss(reflow, {"time_law": law, **shape}, student, batch, ctx)
    named = times.law(law, shape.get("mu"), shape.get("sigma"))
    assert torch.equal(student.seen[1], named(ctx.draw.uniform("t", batch.pairs.data)))


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_reflow_adds_the_flow_matching_of_real_data_with_its_own_labels(distance):
    pairs, data = oracle_pairs((64, 3)).pairs, oracle_data((64, 3)).data
    batch = Batch(data, pairs, {"class_labels": torch.zeros(64)}, {"class_labels": torch.ones(64)})
    seen = []

    class Both(Student):
        def forward(self, x_t, t, cond):
            seen.append((x_t, t, cond["class_labels"]))
            return v2(x_t, t)

    recipe = reflow.Recipe(reflow.Config(data_weight=0.1, distance=distance), None)
    made = recipe.loss({"student": Both(v2)}, batch, context(64))
    (x_pairs, t_pairs, of_pairs), (x_data, t_data, of_data) = seen
    assert torch.equal(of_pairs, torch.zeros(64)) and torch.equal(of_data, torch.ones(64))
    assert not torch.equal(t_pairs, t_data) and not torch.equal(x_pairs, x_data)
    noise = (x_data - like(1 - t_data.double(), data) * data) / like(t_data.double(), data)
    assert noise.mean().abs() < 0.3 and noise.std().item() == pytest.approx(1, abs=0.2)
    expected = (v2(x_data, t_data) - (noise - data)).square().mean()  # squared, whatever the distance of the pairs
    assert made.logs["pairs"] < 1e-12 and made.logs["data"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert made.total.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("t", [0.25, 0.75])
@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_real_data_draws_reflow_towards_the_velocity_of_the_marginals(t, weight):
    """Both fields are -m at x = (1 - t) m; the slope is their mean, weighted with the variances of x_t."""
    count = 200_000
    batch = Batch(oracle_data((count, 1)).data, oracle_pairs((count, 1)).pairs, {})
    fitted = fit(reflow, {"data_weight": weight}, batch, t)
    of_pairs, of_data = ((1 - t) * ROOT + t) ** 2, weight * ((1 - t) ** 2 * LAMBDA + t**2)
    expected = (of_pairs * coefficients(v2, t) + of_data * coefficients(v1, t)) / (of_pairs + of_data)
    assert (fitted - expected).abs().max() < 0.01
    assert min((coefficients(v, t) - expected).abs().max() for v in (v1, v2)) > 0.02


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_jumps_exactly_along_the_straight_field(steps):
    """T04, with the sampler of the recipes."""
    noise = draws.sample_noise(1, range(6), (2, 3)).double()
    x = euler.sample(Student(v2), noise, uniform_grid(steps), {})
    assert (x - target(noise)).abs().max() < 1e-12
    if steps == 1:  # the velocity of the marginals returns the mean
        assert (euler.sample(Student(v1), noise, uniform_grid(1), {}) - M).abs().max() < 1e-12


@pytest.mark.parametrize(("module", "options"), [(flow_matching, {}), (reflow, {}), (one_step, {"steps": 4})])
def test_losses_of_micro_batches_average_to_that_of_the_batch(module, options):
    data, pairs = oracle_data((8, 3)).data, oracle_pairs((8, 3)).pairs

    def part(start, stop):
        batch = Batch(data[start:stop], Pairs(pairs.noise[start:stop], pairs.data[start:stop]), {})
        return loss(module, options, Student(v1), batch, context(Rows(start, stop, 8)))

    assert part(0, 8).item() == pytest.approx((part(0, 4) + part(4, 8)).item() / 2, rel=1e-12)


# --- one step ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_one_step_loss_is_zero_at_the_jump(shape, distance):
    batch = oracle_pairs(shape)
    jump = Student(lambda x, t: x - target(x))
    assert loss(one_step, {"distance": distance}, jump, batch, context(shape[0])) < 1e-12
    assert loss(one_step, {"distance": distance}, Student(v1), batch, context(shape[0])) > 1e-3


def test_one_step_fit_is_the_jump():
    fitted = fit(one_step, {}, oracle_pairs((64, 1)), 0.37)
    assert (fitted - torch.tensor([-M, 1 - ROOT]).double()).abs().max() < 1e-7


def test_one_step_shows_the_student_nothing_but_noise():
    """TRAP 2 of the sheet: at t = 0.999 a thousandth of the target would leak."""
    student, batch = Student(v2), oracle_pairs((16, 3, 4, 4))
    loss(one_step, {}, student, batch, context(16))
    x_t, t, _ = student.seen
    assert (t == 1).all() and torch.equal(x_t, batch.pairs.noise)


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_few_step_loss_is_zero_at_the_straight_field_on_its_own_grid(steps, distance):
    student, count = Student(v2), 6_000
    options = {"steps": steps, "distance": distance}
    assert loss(one_step, options, student, oracle_pairs((count, 2)), context(count)) < 1e-12
    times, counts = student.seen[1].unique(return_counts=True)
    assert torch.allclose(times.flip(0).double(), uniform_grid(steps)[:-1], rtol=0, atol=1e-7)
    assert times.max() == 1
    expected = count / steps
    assert (counts - expected).abs().max() < 4 * math.sqrt(expected)
    grids = one_step.Recipe(one_step.Config(**options), None).t_grids(None)
    assert grids == {n: uniform_grid(n).tolist() for n in range(1, steps + 1) if steps % n == 0}


def test_one_step_lpips_compares_images(lpips_options):
    batch = oracle_pairs((2, 3, 16, 16))
    noise, data = batch.pairs.noise, batch.pairs.data
    options = {
        **lpips_options,
        "distance": "l2+lpips",
        "lpips_weight": 0.5,
        "lpips_heads": False,
        "lpips_resize": "to_64",
    }
    recipe = one_step.Recipe(one_step.Config(**options), None)
    student = Student(v1)
    roles = recipe.networks(given(student))
    assert roles["student"] == Trained(student) and isinstance(roles["lpips"], Frozen)
    metric = roles["lpips"].module
    nets = {"student": student, "lpips": metric}
    made = recipe.loss(nets, batch, context(2))
    lpips = metric(noise - v1(noise, torch.ones(2)), data).mean()
    assert lpips > 0 and made.logs["lpips"] == lpips
    assert made.total.item() == pytest.approx(made.logs["l2"].item() + 0.5 * lpips.item(), rel=1e-9)
    alone = one_step.Recipe(one_step.Config(**lpips_options, distance="lpips", lpips_resize="to_64"), None)
    metric = alone.networks(given(student))["lpips"].module
    jump = {"student": Student(lambda x, t: x - target(x)), "lpips": metric}
    assert alone.loss(jump, batch, context(2)).total < 1e-10
    assert alone.loss({**jump, "student": student}, batch, context(2)).total > 1e-3


def test_lpips_is_refused_for_vectors(lpips_options):
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[M, M], std=[ROOT, ROOT]))
    config = one_step.Config(**lpips_options, distance="lpips")
    with pytest.raises(InputError, match=r"LPIPS compares images, but samples have shape \[2\]; use distance: l2"):
        one_step.Recipe(config, teacher)


def test_label_dropout_without_classes_is_refused():
    init = given(Student(v1), None)
    flow_matching.Recipe(flow_matching.Config(), None).networks(init)  # the default says nothing
    with pytest.raises(InputError, match="label_dropout has no effect without classes; remove it, or give labelled"):
        flow_matching.Recipe(flow_matching.Config(label_dropout=0.2), None).networks(init)


# --- options ---


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            flow_matching,
            {"mu": 0.0},
            "mu and sigma have no effect with time_law: uniform; remove them or use logit_normal",
        ),
        (flow_matching, {"sigma": 2.0}, "mu and sigma have no effect with time_law: uniform"),
        (flow_matching, {"label_dropout": 1.5}, "less than or equal to 1"),
        (flow_matching, {"time_law": "u_shaped"}, "'uniform' or 'logit_normal'"),
        (reflow, {"distance": "lpips"}, "'l2' or 'pseudo_huber'"),
        (reflow, {"sigma": 1.0}, "mu and sigma have no effect with time_law: uniform; remove them or use logit_normal"),
        (reflow, {"data_weight": 0}, "greater than 0"),
        (reflow, {"steps": 2}, "Extra inputs are not permitted"),
        (one_step, {"steps": 0}, "greater than 0"),
        (one_step, {"lpips_heads": True}, "lpips_heads: no effect with distance: l2; remove them, or use l2+lpips"),
        (one_step, {"distance": "lpips"}, "distance: lpips needs lpips_trunk and lpips_path"),
        (one_step, {"distance": "lpips", "lpips_trunk": "vgg"}, "distance: lpips needs lpips_trunk and lpips_path"),
        (one_step, {"distance": "l2+lpips", "lpips_path": "nowhere"}, "Path does not point to a file"),
    ],
)
def test_options_without_effect_or_sense_are_refused(module, options, message):
    with pytest.raises(ValidationError) as caught:
        module.Config(**options)
    assert message in str(caught.value)


def test_lpips_options_without_effect_are_refused(lpips_options):
    with pytest.raises(ValidationError, match="works only with steps: 1, not 4"):
        one_step.Config(**lpips_options, distance="lpips", steps=4)
    with pytest.raises(ValidationError, match="lpips_weight has no effect with distance: lpips; remove"):
        one_step.Config(**lpips_options, distance="lpips", lpips_weight=2.0)
    with pytest.raises(ValidationError, match="lpips_trunk, lpips_path: no effect with distance: l2"):
        one_step.Config(**lpips_options)


@pytest.mark.parametrize(
    ("module", "needs"),
    [(flow_matching, {"data"}), (reflow, {"teacher", "pairs"}), (one_step, {"teacher", "pairs"})],
)
def test_configs_say_what_they_need_and_survive_being_written_out(module, needs):
    config = module.Config()
    assert config.needs == needs and config.student == "velocity"
    if module is reflow:
        assert module.Config(data_weight=0.1).needs == needs | {"data"}
    assert module.Config(**config.model_dump(mode="json")) == config  # a resolved spec can be run again
    for name, field in module.Config.model_fields.items():
        assert field.description, f"option {name} has no description"


SUBJECTS = [
    testing.Subject(
        "pretrain/flow_matching",
        closed_form=(
            lambda: test_flow_matching_regresses_to_the_velocity_of_the_marginals(0.5),
            test_flow_matching_gradient_is_zero_in_the_mean_at_the_exact_field_only,
        ),
    ),
    testing.Subject(
        "reflow/reflow",
        steps=(1, 2),
        closed_form=(
            lambda: test_reflow_loss_is_zero_at_the_straight_field_only((7, 3), "l2", "uniform"),
            lambda: test_one_round_of_reflow_recovers_the_straight_field(0.25),
        ),
    ),
    testing.Subject(
        "reflow/one_step",
        closed_form=(
            lambda: test_one_step_loss_is_zero_at_the_jump((7, 3), "l2"),
            test_one_step_fit_is_the_jump,
            test_one_step_shows_the_student_nothing_but_noise,
        ),
    ),
]
