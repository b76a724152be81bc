"""Recipe caf on Gaussian pairs (reflow sheet T16): paths of constant acceleration, exact for any number of steps."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.core.errors import InputError
from distill.flow.draws import generator
from distill.flow.interpolants import like
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Frozen, Pairs, Trained
from distill.students.samplers import accelerated
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher
from recipes.reflow.caf import Config, Recipe, bent


def draw(name, *shape):
    return torch.randn(shape, generator=generator(name), dtype=torch.float64)


def straight(noise):
    """noise - data of the pairs."""
    return (1 - exact.STD) * noise - exact.MEAN


def pairs(count):
    noise = draw("pairs", count, 3)
    return Batch(None, Pairs(noise, noise - straight(noise)), {})


def solution(h):
    """Both networks at their minimum, and what they were called with."""
    calls = []

    def function(x_t, t, v, cond):
        calls.append((x_t, t, v))
        if v is not None:
            return 2 * (1 - 1 / h) * v  # of v = h line
        u = like(1 - t, x_t).double()
        c = u * h - u.square() * (h - 1)  # x_t = noise - c line
        return h * straight((x_t - c * exact.MEAN) / (1 - c * (1 - exact.STD)))

    return exact.Network(function), calls


def loss(student, batch, ctx, h=1.5):
    turns = list(Recipe(Config(h=h), None).turns(0, 0))
    assert [turn.network for turn in turns] == ["student"]
    return turns[0].loss({"student": student}, batch, ctx)


# --- paths and sampler ---


def test_the_path_has_constant_acceleration_and_both_its_ends():
    """(1 - u^2) noise + u^2 data + (u - u^2) V = noise + V u + A u^2 / 2, V = -v, A = 2 (data - noise) - 2 V."""
    noise, data, v = (draw(name, 5, 3) for name in ("noise", "data", "v"))
    t = torch.linspace(0, 1, 5).double()
    u, x_t = 1 - t[:, None], bent(noise, noise - data, v, t)
    paper = (1 - u**2) * noise + u**2 * data + (u - u**2) * -v
    assert torch.allclose(x_t, paper, rtol=0, atol=1e-12)
    acceleration = 2 * (data - noise) - 2 * -v
    assert torch.allclose(x_t, noise - v * u + acceleration * u**2 / 2, rtol=0, atol=1e-12)
    assert torch.equal(x_t[-1], noise[-1]) and torch.allclose(x_t[0], data[0], rtol=0, atol=1e-12)
    _, velocity = torch.func.jvp(lambda t: bent(noise, noise - data, v, t), (t,), (torch.ones_like(t),))
    assert torch.allclose(velocity, v - u * 2 * (v - (noise - data)), rtol=0, atol=1e-12)  # dv/dt = 2 (v - line)


@pytest.mark.parametrize("h", [1.5, 0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_any_number_of_steps_is_exact_and_costs_one_call_more(steps, h):
    """T16."""
    student, calls = solution(h)
    noise = draw("z", 7, 3)
    found = accelerated.sample(student, noise, uniform_grid(steps), {})
    assert (found - (noise - straight(noise))).abs().max() < 1e-12
    assert len(calls) == steps + 1
    assert [v is None for _, _, v in calls] == [True] + [False] * steps
    assert [t[0].item() for _, t, _ in calls] == [1.0, *uniform_grid(steps)[:-1].tolist()]


def test_steps_of_any_length_are_exact():
    student, _ = solution(1.5)
    noise = draw("z", 7, 3)
    found = accelerated.sample(student, noise, torch.tensor([1.0, 0.9, 0.25, 0.2, 0.0]).double(), {})
    assert (found - (noise - straight(noise))).abs().max() < 1e-12


# --- the losses ---


@pytest.mark.parametrize("h", [1.5, 0.5, 1.0])
def test_both_losses_are_zero_at_the_solution_only(h):
    student, _ = solution(h)
    found = loss(student, pairs(64), exact.context(64), h)
    assert found.logs["velocity"] < 1e-12 and found.logs["acceleration"] < 1e-12
    faster, _ = solution(h + 0.5)
    assert loss(faster, pairs(64), exact.context(64), h).logs["velocity"] > 1e-2
    bent_more = exact.Network(lambda x_t, t, v, cond: student(x_t, t, v, cond) + (0 if v is None else v))
    found = loss(bent_more, pairs(64), exact.context(64), h)
    assert found.logs["velocity"] < 1e-12 and found.logs["acceleration"] > 1e-2


def test_the_acceleration_makes_up_for_errors_of_the_velocity():
    """Its target counts from the velocity that it is given: with a wrong one the samples are as exact."""
    student = exact.Network(
        lambda x_t, t, v, cond: 0.3 * x_t if v is None else 2 * (v - straight(v / 0.3))  # of v = 0.3 noise
    )
    found = loss(student, pairs(64), exact.context(64))
    assert found.logs["acceleration"] < 1e-12 and found.logs["velocity"] > 1e-2
    noise = draw("z", 7, 3)
    for steps in (1, 3):
        samples = accelerated.sample(student, noise, uniform_grid(steps), {})
        assert (samples - (noise - straight(noise))).abs().max() < 1e-12


def test_each_network_learns_from_its_own_loss_alone():
    """The velocity that the acceleration is given carries no gradient, and is that of the noise at exactly t = 1."""
    v_scale, a_scale = (nn.Parameter(torch.full((3,), each, dtype=torch.float64)) for each in (0.4, 0.7))
    given = []

    def function(x_t, t, v, cond):
        given.append((x_t, t, v))
        return v_scale * x_t if v is None else a_scale * v + 0.1 * x_t

    batch, context = pairs(32), exact.context(32)
    found = loss(exact.Network(function), batch, context)
    grads = torch.autograd.grad(found.total, (v_scale, a_scale), retain_graph=True)
    (x, _, _), (first, at, _), (x_t, t, v) = given
    line = straight(batch.pairs.noise)
    assert torch.equal(first, batch.pairs.noise) and (at == 1).all()
    assert not v.requires_grad and torch.equal(v, v_scale.detach() * batch.pairs.noise)
    assert torch.allclose(x, bent(batch.pairs.noise, line, 1.5 * line, context.draw.uniform("t_velocity", x)))
    assert torch.allclose(x_t, bent(batch.pairs.noise, line, v, t))

    def huber(difference):
        c = 0.00054 * 3
        return ((difference.square().sum(1) + c**2).sqrt() - c).mean() / 3

    expected = huber(v_scale * x - 1.5 * line), huber(a_scale * v + 0.1 * x_t - 2 * (v - line))
    assert found.total.item() == pytest.approx(sum(expected).item(), rel=1e-9)
    for mine, one, scale in zip(grads, expected, (v_scale, a_scale), strict=True):
        assert torch.allclose(mine, torch.autograd.grad(one, scale, retain_graph=True)[0], rtol=1e-9)


def test_times_of_both_networks_cover_the_path_and_are_their_own():
    student, calls = solution(1.5)
    loss(student, pairs(20_000), exact.context(20_000))
    (_, first, _), _, (_, second, _) = calls
    for t in (first, second):
        assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("h", [1.5, 0.5])
def test_lpips_compares_the_data_to_which_predictions_lead(h, lpips_options):
    """Both of its terms are zero at the solution, wherever on the path."""
    recipe = Recipe(Config(h=h, **lpips_options), None)
    noise = torch.randn(2, 3, 16, 16, generator=generator("pairs"))
    line = noise / 2  # data = noise / 2

    def network(factor):
        return exact.Network(
            lambda x_t, t, v, cond: factor * h * line if v is None else factor * 2 * (1 - 1 / h) * v / factor
        )

    roles = recipe.networks(exact.Given(network(1.0)))
    assert isinstance(roles["student"], Trained) and isinstance(roles["lpips"], Frozen)
    batch, lpips = Batch(None, Pairs(noise, noise - line), {}), roles["lpips"].module
    right = recipe.loss({"student": network(1.0), "lpips": lpips}, batch, exact.context(2)).logs
    wrong = recipe.loss({"student": network(1.3), "lpips": lpips}, batch, exact.context(2)).logs
    for name in ("velocity_lpips", "acceleration_lpips"):
        assert right[name] < 1e-9 < 1e-5 < wrong[name]
    assert set(right) == {"velocity", "acceleration", "velocity_lpips", "acceleration_lpips"}


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"h": 0.0}, "greater than 0"),
        ({"lpips_trunk": "vgg"}, "lpips_trunk and lpips_path must be given together; give both or neither"),
        ({"steps": 2}, "Extra inputs are not permitted"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        Config(**options)
    assert message in str(caught.value)


def test_lpips_is_refused_for_vectors(tmp_path):
    (tmp_path / "trunk").touch()
    config = Config(lpips_trunk="vgg", lpips_path=tmp_path / "trunk")
    teacher = class_gaussian_teacher(torch.zeros(2, 3), torch.zeros(3), torch.ones(3))
    with pytest.raises(
        InputError, match=r"LPIPS compares images, but samples have shape \[3\]; remove it and lpips_path"
    ):
        Recipe(config, teacher)


SUBJECTS = [
    testing.Subject(
        "reflow/caf",
        steps=(1, 2),
        closed_form=(
            lambda: test_any_number_of_steps_is_exact_and_costs_one_call_more(3, 1.5),
            lambda: test_both_losses_are_zero_at_the_solution_only(1.5),
            test_the_acceleration_makes_up_for_errors_of_the_velocity,
            test_each_network_learns_from_its_own_loss_alone,
        ),
    )
]
