"""Recipe slimflow on Gaussians (reflow sheet T14): annealed coupling, optimal velocity, zero guidance loss at v2."""

import math

import pytest
import torch
from choices import few
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.core.errors import InputError
from distill.flow.draws import Rows, StepDraw, generator
from distill.flow.interpolants import like
from distill.protocols import Batch, Frozen, Pairs, Trained
from distill.testing import exact
from distill.testing.subject import start
from distill.training.engine import StepContext
from recipes.reflow.slimflow import Config, Recipe

K = 1000  # anneal_images
ANNEAL = {"phase": "anneal", "anneal_images": K}


def pairs(count):
    noise = torch.randn(count, 3, generator=generator("pairs"), dtype=torch.float64)
    return Batch(None, Pairs(noise, exact.MEAN + exact.STD * noise), {})


v1, v2 = exact.FIELD, exact.STRAIGHT


def loss(options, batch, ctx, *networks):
    """Of the student, and for distill of the flow."""
    turns = list(Recipe(Config(**options), None).turns(0, 0))
    assert [turn.network for turn in turns] == ["student"]
    return turns[0].loss(dict(zip(("student", "flow")[: len(networks)], networks, strict=True)), batch, ctx)


def annealed(images, schedule="linear", count=100_000):
    """What the student is shown at t = 1: the noise of the coupling, and the pairs' own."""
    seen, batch = [], pairs(count)
    student = exact.Network(lambda x_t, t, cond: seen.append(x_t) or x_t)
    loss({**ANNEAL, "schedule": schedule}, batch, exact.context(count, images=images, uniforms={"t": 1.0}), student)
    return seen[0], batch.pairs.noise


# --- the annealed coupling ---


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", (1, 0.75, 0.25, 0, 0)),
        ("exp", (1, math.exp(-0.25), math.exp(-0.75), math.exp(-1), math.exp(-2))),
        ("cosine", (1, 0.5 + math.sqrt(0.125), 0.5 - math.sqrt(0.125), 0, 0)),
    ],
)
def test_noise_stays_standard_normal_while_its_correlation_with_the_pairs_grows(schedule, betas):
    """T14: Var(noise_b) = 1, corr(noise_b, noise) = sqrt(1 - beta^2)."""
    for images, beta in zip((0, K // 4, 3 * K // 4, K, 2 * K), betas, strict=True):
        shown, noise = annealed(images, schedule)
        tolerance = 4 / math.sqrt(shown.numel())
        assert shown.mean().item() == pytest.approx(0, abs=tolerance)
        assert shown.var().item() == pytest.approx(1, abs=3 / math.sqrt(len(shown)))
        correlation = torch.corrcoef(torch.stack([shown.flatten(), noise.flatten()]))[0, 1].item()
        assert correlation == pytest.approx(math.sqrt(1 - beta**2), abs=tolerance)
        if beta == 0:
            assert torch.equal(shown, noise)


def best(t, beta, count=1):
    """(intercept, slope) [2, 3] of E[noise_b - data | x_t], jointly Gaussian with Cov(noise_b, data) = STD root; and
    their standard errors [2, 3] in a regression of `count` samples.
    """
    covariance = exact.STD * math.sqrt(1 - beta**2)
    of_x = (1 - t) ** 2 * exact.STD.square() + t**2 + 2 * t * (1 - t) * covariance
    slope = (t - (1 - t) * exact.STD.square() + (1 - 2 * t) * covariance) / of_x
    left = (1 + exact.STD.square() - 2 * covariance - slope.square() * of_x).clamp(min=0)  # variance given x_t
    error = (left / of_x / count).sqrt()
    mean = (1 - t) * exact.MEAN
    return torch.stack([-exact.MEAN - slope * mean, slope]), torch.stack([(of_x + mean.square()).sqrt() * error, error])


@pytest.mark.parametrize("t", few([0.125, 0.5, 0.875], 0.5))
def test_the_best_velocity_goes_from_that_of_the_marginals_to_the_straight_one(t):
    """T14: beta = 1 is v1, beta = 0 v2; between them, least squares finds the regression of the Gaussian."""
    at, zero, one = torch.full((1,), t).double(), torch.zeros(1, 3).double(), torch.ones(1, 3).double()
    for beta, field in ((1, v1), (0, v2)):
        intercept, slope = best(t, beta)[0]
        assert (field(zero, at, {}) - intercept).abs().max() < 1e-12
        assert (field(one, at, {}) - field(zero, at, {}) - slope).abs().max() < 1e-12
    count = 200_000
    for images in (0, K // 4, K // 2, K):
        parameters = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        student = exact.Network(lambda x_t, t, cond, p=parameters: p[0] + p[1] * x_t)
        context, batch = exact.context(count, images=images, uniforms={"t": t}), pairs(count)

        def gradient(student=student, context=context, batch=batch, parameters=parameters):
            total = loss(ANNEAL, batch, context, student).total
            return torch.autograd.grad(total, parameters, create_graph=True)[0]

        first = gradient()
        rows = [torch.autograd.grad(each, parameters, retain_graph=True)[0].flatten() for each in first.flatten()]
        fitted = torch.linalg.solve(torch.stack(rows), -first.detach().flatten()).reshape(2, 3)  # one Newton step
        expected, error = best(t, 1 - images / K, count)
        assert ((fitted - expected).abs() < 4 * error + 1e-9).all()


def test_annealed_training_is_at_rest_at_the_straight_field_once_beta_is_zero():
    context, batch = exact.context(64, images=K), pairs(64)
    assert loss(ANNEAL, batch, context, v2).total < 1e-24
    assert loss(ANNEAL, batch, context, exact.Network(v1)).total > 1e-3
    assert loss(ANNEAL, batch, exact.context(64, images=0), v2).total > 1e-3


# --- flow-guided distillation ---


@pytest.mark.parametrize("middle", ["student", "flow"])
def test_both_terms_are_zero_where_student_and_flow_are_the_straight_field(middle):
    found = loss({"middle": middle}, pairs(256), exact.context(256), v2, v2)
    assert found.total < 1e-12 and found.logs["pairs"] < 1e-24
    crooked = loss({"middle": middle}, pairs(256), exact.context(256), v2, exact.Network(v1))
    assert crooked.logs["pairs"] < 1e-24 and crooked.logs["guided"] > 1e-3


def test_the_student_is_shown_nothing_but_noise():
    """TRAP 2 of the sheet: at t = 0.999 a thousandth of the target would leak."""
    seen, flow_times, batch = [], [], pairs(512)
    student = exact.Network(lambda x_t, t, cond: seen.append((x_t, t)) or v2(x_t, t, cond))
    flow = exact.Network(lambda x_t, t, cond: flow_times.append(t) or v2(x_t, t, cond))
    loss({}, batch, exact.context(512), student, flow)
    assert all((t == 1).all() for _, t in seen)
    fresh = exact.context(512).draw.normal("fresh", batch.pairs.noise)
    assert [torch.equal(x_t, given) for (x_t, _), given in zip(seen, (fresh, batch.pairs.noise), strict=True)] == [
        True, True
    ]  # fmt: skip
    (t,) = flow_times
    assert 0.2 <= t.min() < 0.21 and 0.79 < t.max() < 0.8 and t.mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("middle", ["student", "flow"])
def test_the_target_of_the_second_term_is_two_steps_of_the_flow_and_takes_no_gradient(middle):
    """With affine networks its gradient is known: that of fresh - v(fresh, 1) alone."""
    count, slope = 64, nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
    student = exact.Network(lambda x_t, t, cond: slope * x_t)
    batch, context = pairs(count), exact.context(count, uniforms={"t": 0.5})  # t = 0.5
    found = loss({"middle": middle}, batch, context, student, exact.Network(v1))
    found.total.backward()
    fresh = context.draw.normal("fresh", batch.pairs.noise)
    first = slope.detach() * fresh if middle == "student" else v1(fresh, torch.ones(count), {})
    x_t = fresh - 0.5 * first
    target = x_t - 0.5 * v1(x_t, torch.full((count,), 0.5), {})
    moved = (fresh - slope * fresh - target).square().mean()
    moved = moved + (slope * batch.pairs.noise - (batch.pairs.noise - batch.pairs.data)).square().mean()
    assert found.total.item() == pytest.approx(moved.item(), rel=1e-6)
    assert torch.allclose(torch.autograd.grad(moved, slope)[0], slope.grad, rtol=1e-12)


def test_the_flow_is_what_the_student_starts_as_and_never_moves():
    recipe, init, _ = start(testing.Subject("reflow/slimflow"))
    roles = recipe.networks(init)
    student, flow = roles["student"], roles["flow"]
    assert isinstance(student, Trained) and isinstance(flow, Frozen) and student.module is not flow.module
    assert testing.subject.bits(student.module.state_dict()) == testing.subject.bits(flow.module.state_dict())
    assert list(Recipe(Config(**ANNEAL), None).networks(init)) == ["student"]


def test_lpips_compares_data(lpips_options):
    recipe = Recipe(Config(distance="lpips", **lpips_options), None)
    straight = exact.Network(lambda x_t, t, cond: x_t / (1 + like(t, x_t)))  # noise to noise / 2
    lpips = recipe.networks(exact.Given(straight))["lpips"].module
    noise = torch.randn(2, 3, 16, 16, generator=generator("pairs"))
    nets = {"student": straight, "flow": straight, "lpips": lpips}
    assert recipe.distill(nets, Batch(None, Pairs(noise, noise / 2), {}), exact.context(2)).total < 1e-9
    found = recipe.distill(nets, Batch(None, Pairs(noise, noise / 3), {}), exact.context(2))
    assert found.logs["guided"] < 1e-9 and found.logs["pairs"] == lpips(noise / 2, noise / 3).mean() > 1e-4


# --- mirrored pairs ---


@pytest.mark.parametrize("options", [{}, ANNEAL])
def test_a_mirrored_batch_is_mirrored_at_both_ends_on_every_rank(options):
    noise, data = (torch.randn(8, 1, 4, 4, generator=generator(name)) for name in ("noise", "data"))
    recipe, seen, outcomes = Recipe(Config(**options, flip=True), None), [], set()
    student = exact.Network(lambda x_t, t, cond: seen.append(x_t) or x_t)
    for step in range(12):
        for rows in (Rows(0, 8, 8), Rows(0, 4, 8), Rows(4, 8, 8)):
            part = slice(rows.start, rows.stop)
            batch = Batch(None, Pairs(noise[part], data[part]), {})
            context = StepContext(step, K, exact.Draws(StepDraw(0, step, 0, rows), {}, {"t": 1.0}), {})
            ends = recipe.ends(batch, context)
            mirrored = torch.equal(ends[0], data[part].flip(-1)) and torch.equal(ends[1], noise[part].flip(-1))
            assert mirrored or (torch.equal(ends[0], data[part]) and torch.equal(ends[1], noise[part]))
            outcomes.add((step, mirrored))
            next(recipe.turns(0, 0)).loss({"student": student, "flow": student}, batch, context)
            assert torch.equal(seen[-1], ends[1])  # the noise, at t = 1
    assert len(outcomes) == 12 and {mirrored for _, mirrored in outcomes} == {True, False}


@pytest.mark.parametrize("options", [{"flip": True}, {**ANNEAL, "flip": True}])
def test_vectors_are_not_mirrored_but_latents_are(options):
    with pytest.raises(InputError, match=r"flip needs images, but samples have shape \[3\]; remove it"):
        Recipe(Config(**options), exact.teacher(exact.FIELD))
    Recipe(Config(**options), exact.teacher(exact.FIELD, (4, 8, 8)))


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8)])
def test_lpips_is_refused_for_what_it_cannot_see(lpips_options, shape):
    config = Config(distance="lpips", **lpips_options)
    with pytest.raises(InputError, match=r"LPIPS compares images, but samples have shape \[.*\]; use distance: l2"):
        Recipe(config, exact.teacher(exact.FIELD, shape))
    Recipe(config, exact.teacher(exact.FIELD, (1, 8, 8)))


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": "anneal"}, "phase: anneal needs anneal_images, the number of images until beta is 0"),
        ({"anneal_images": 5, "schedule": "exp"}, "anneal_images, schedule: no effect with phase: distill; remove"),
        ({**ANNEAL, "middle": "flow"}, "middle: no effect with phase: anneal; remove"),
        ({**ANNEAL, "distance": "lpips"}, "distance: no effect with phase: anneal; remove"),
        ({"distance": "lpips"}, "distance: lpips needs lpips_trunk and lpips_path"),
        ({"lpips_trunk": "vgg"}, "lpips_trunk: no effect with distance: l2; remove them, or use lpips"),
        ({**ANNEAL, "anneal_images": 0}, "greater than 0"),
        ({**ANNEAL, "schedule": "sine"}, "'linear', 'exp' or 'cosine'"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        Config(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{}, ANNEAL, {"middle": "flow", "flip": True}])
def test_a_resolved_config_can_be_read_again(options):
    config = Config(**options)
    assert Config(**config.model_dump(mode="json")) == config
    assert config.needs == {"teacher", "pairs"} | (set() if config.phase == "anneal" else {"weights"})
    assert config.student == "velocity"


SUBJECTS = [
    testing.Subject(
        "reflow/slimflow",
        ring={"phase": "anneal", "anneal_images": 200_000},
        closed_form=(
            lambda: test_noise_stays_standard_normal_while_its_correlation_with_the_pairs_grows(
                "linear", (1, 0.75, 0.25, 0, 0)
            ),
            lambda: test_the_best_velocity_goes_from_that_of_the_marginals_to_the_straight_one(0.5),
            lambda: test_both_terms_are_zero_where_student_and_flow_are_the_straight_field("student"),
        ),
    )
]
