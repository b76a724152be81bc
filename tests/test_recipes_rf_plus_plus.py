"""Recipe rf_plus_plus at its exact solution (reflow sheet 4: T07, T09), for Gaussian data."""

import math

import pytest
import torch
from choices import few
from diffusers import UNet2DModel
from pydantic import ValidationError
from scipy.stats import kstest
from test_recipes_reflow import (
    LAMBDA,
    SHAPES,
    M,
    Student,
    context,
    given,
    loss,
    oracle_pairs,
    v1,
    v2,
)
from test_times import u_shaped_cdf

from distill import testing
from distill.core.errors import InputError
from distill.networks.architectures import build
from distill.protocols import Frozen, Trained
from distill.spec.model import GaussianTeacher, UNetSpec
from distill.students.init import StudentInit
from distill.teachers.analytic import gaussian_teacher
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField
from recipes.reflow import rf_plus_plus
from recipes.reflow.rf_plus_plus import Config, Recipe


@pytest.mark.parametrize("shape", SHAPES)
def test_without_lpips_the_loss_is_zero_at_the_straight_field_only(shape):
    batch = oracle_pairs(shape)
    assert loss(rf_plus_plus, {}, Student(v2), batch, context(shape[0])) < 1e-12  # T07
    assert loss(rf_plus_plus, {}, Student(v1), batch, context(shape[0])) > 1e-3


def test_without_lpips_the_noise_end_is_trained_as_any_other():
    """A weight of 1 - t would give a one-step student nothing."""
    batch, wrong = oracle_pairs((16, 3)), Student(lambda x, t: v2(x, t) + 0.1)
    middle, end = (loss(rf_plus_plus, {}, wrong, batch, context(16, u=u)).item() for u in (0.5, 1.0))
    assert end == pytest.approx(middle, rel=1e-6) and end > 1e-3


def test_times_are_u_shaped():  # T09
    student = Student(v2)
    loss(rf_plus_plus, {}, student, oracle_pairs((200_000, 1)), context(200_000))
    assert kstest(student.seen[1].double().numpy(), u_shaped_cdf).pvalue > 0.01


def with_lpips(options, function, batch, ctx):
    """The loss, and the network that LPIPS is."""
    recipe, student = Recipe(Config(**options), None), Student(function)
    roles = recipe.networks(given(student))
    assert roles["student"] == Trained(student) and isinstance(roles["lpips"], Frozen)
    metric = roles["lpips"].module
    return recipe.loss({"student": student, "lpips": metric}, batch, ctx), metric


@pytest.mark.parametrize("over_t", few([False, True], True))
def test_with_lpips_the_loss_is_zero_at_the_straight_field_for_every_t(lpips_options, over_t):
    options, batch = {**lpips_options, "lpips_over_t": over_t, "lpips_resize": "to_64"}, oracle_pairs((2, 3, 8, 8))
    for u in (0.0, 0.2, 0.5, 0.9, 1.0):
        assert with_lpips(options, v2, batch, context(2, u=u))[0].total < 1e-9
        assert with_lpips(options, v1, batch, context(2, u=u))[0].total > 1e-6


@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("over_t", [None, False, True])
def test_lpips_of_the_predicted_data_is_weighed_as_the_configuration_says(lpips_options, over_t, u):
    options, batch = (
        {**lpips_options, "lpips_over_t": over_t, "lpips_heads": False, "lpips_resize": "to_64"},
        oracle_pairs((2, 3, 8, 8)),
    )
    made, metric = with_lpips(options, v1, batch, context(2, u=u))
    t = 1e-5 + (0.5 + math.asinh((2 * u - 1) * math.sinh(2)) / 4) * (1 - 2e-5)
    data, noise = batch.pairs.data, batch.pairs.noise
    x_t = (1 - t) * data + t * noise
    lpips = metric(x_t - t * v1(x_t, torch.full((2,), t)), data).mean()
    difference = (v1(x_t, torch.full((2,), t)) - (noise - data)).flatten(1)
    c = 0.00054 * 192
    huber = (((difference.square().sum(1) + c**2).sqrt() - c) / 192).mean()
    weight = min(1 / t, 1000) if over_t else 1
    assert made.logs["huber"].item() == pytest.approx(huber.item(), rel=1e-5)
    assert made.logs["lpips"].item() == pytest.approx(lpips.item(), rel=1e-4, abs=1e-10)
    assert made.total.item() == pytest.approx((1 - t) * huber.item() + weight * lpips.item(), rel=1e-4)


def test_an_edm_network_starts_as_the_velocity_of_its_denoiser(monkeypatch):
    """Check (i): the student made from an EDM teacher whose network is the exact denoiser of N(m, lambda), is v1."""
    sigma_data = 0.5

    def exact(network, scaled, c_noise, condition=None, **given):
        """F such that D = c_skip x + c_out F is (sigma^2 m + lambda x) / (lambda + sigma^2)."""
        sigma = torch.exp(4 * c_noise.double())[:, None, None, None]
        norm = (sigma**2 + sigma_data**2).sqrt()
        x = norm * scaled.double()
        data = (sigma**2 * M + LAMBDA * x) / (LAMBDA + sigma**2)
        output = (data - sigma_data**2 / norm**2 * x) / (sigma * sigma_data / norm)
        return type("Output", (), {"sample": output.to(scaled.dtype)})

    network = build(UNetSpec(kind="unet", channels=[8], norm_groups=4), (1, 8, 8), None, seed=0)
    field = EdmField(network, sigma_data, 1, (0.002 / 1.002, 80 / 81))
    teacher = LoadedTeacher(field, (1, 8, 8), None, None, "0" * 64, "an EDM teacher", network)
    roles = Recipe(Config(), teacher).networks(StudentInit(teacher, None, (1, 8, 8), None, 0, teacher))
    student = roles["student"].module
    monkeypatch.setattr(UNet2DModel, "forward", exact)
    t = torch.linspace(0.002, 80 / 81, 500, dtype=torch.float64)
    x = 2 * torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (student(x, t, {}) - v1(x, t)).abs().max() < 1e-6
    # beyond 80 the student is called too: it holds what the network knew at 80
    t = torch.linspace(80 / 81, 1, 50, dtype=torch.float64)
    assert (student(x[:50], t, {}) - v1(x[:50], t)).abs().max() < 1e-2


def test_the_new_update_rule_is_an_option():
    """What it does: test_samplers.py, T08."""
    assert [Recipe(Config(sampler=name), None).sampler for name in ("euler", "same_noise")] == ["euler", "same_noise"]
    assert Recipe(Config(), None).sampler == "euler"


def test_lpips_is_refused_for_vectors(lpips_options):
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[M, M], std=[1, 1]))
    with pytest.raises(
        InputError, match=r"lpips_trunk: LPIPS compares images, but samples have shape \[2\]; remove it"
    ):
        Recipe(Config(**lpips_options), teacher)
    Recipe(Config(), teacher)


def test_lpips_options_without_effect_are_refused(lpips_options):
    with pytest.raises(ValidationError, match="lpips_heads, lpips_over_t: no effect without lpips_trunk; give it, or"):
        Config(lpips_heads=True, lpips_over_t=False)
    with pytest.raises(ValidationError, match="lpips_path: no effect without lpips_trunk"):
        Config(lpips_path=lpips_options["lpips_path"])
    with pytest.raises(ValidationError, match="lpips_trunk needs lpips_path, the file of its weights"):
        Config(lpips_trunk="vgg")
    assert Config(**lpips_options).needs == {"teacher", "pairs"} and Config().student == "velocity"


SUBJECTS = [
    testing.Subject(
        "reflow/rf_plus_plus",
        steps=(1, 2),
        closed_form=(
            lambda: test_without_lpips_the_loss_is_zero_at_the_straight_field_only((7, 3)),
            test_without_lpips_the_noise_end_is_trained_as_any_other,
            test_times_are_u_shaped,
        ),
    ),
]
