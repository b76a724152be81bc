"""LPIPS of samples that are latents: of decoded images with gradients through the decoder, or of the latents."""

from pathlib import Path

import pytest
import test_teacher_dit as dit
import torch
from latent import autoencoder, load, normal, seeded, write
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from distill.core.errors import InputError
from distill.flow.distances import Lpips, LpipsOptions
from distill.flow.interpolants import linear
from distill.flow.latent_lpips import DecodedLpips, LatentLpips
from distill.protocols import Batch, Frozen, Pairs
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers.codecs import LatentCodec
from distill.testing import exact
from recipes.reflow import caf, one_step, rf_plus_plus, slimflow

WIDTHS = (64, 128, 256, 512, 512)
A, B = normal(2, 4, 4, 8, seed=1), normal(2, 4, 4, 8, seed=2)


def latent_vgg(channels: int = 4) -> nn.Sequential:
    """Torchvision's VGG16 with batch normalisation, as the authors change it for latents."""
    features = seeded(lambda: make_layers(cfgs["D"], batch_norm=True))
    features[0] = seeded(lambda: nn.Conv2d(channels, 64, 3, padding=1))
    for place in [i for i, each in enumerate(features) if isinstance(each, nn.MaxPool2d)][:3]:
        features[place] = nn.Identity()
    for each in features:
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.copy_(0.1 * normal(len(each.running_mean), seed=3))
            each.running_var.copy_(normal(len(each.running_var), seed=4).exp())
    return features.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    return latent_vgg()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, vgg) -> Path:
    """With heads, under the names of torchvision."""
    path = tmp_path_factory.mktemp("latent trunk") / "vgg.safetensors"
    heads = {f"lin{i}.weight": normal(1, width, 1, 1, seed=i).abs() for i, width in enumerate(WIDTHS)}
    save_file({f"features.{name}": each for name, each in vgg.state_dict().items()} | heads, path)
    return path


def by_hand(vgg: nn.Sequential, a, b, heads: bool):
    """From the layers of torchvision: the ends of the stages are their layers 6, 13, 23, 33 and 43."""
    total = torch.zeros(len(a))
    for place, layer in enumerate(vgg):
        a, b = layer(a), layer(b)
        if place in (6, 13, 23, 33, 43):
            i = (6, 13, 23, 33, 43).index(place)
            squares = (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)).square()
            weight = normal(1, WIDTHS[i], 1, 1, seed=i).abs() if heads else 1.0
            total += (squares * weight).sum(1).mean((1, 2))
    return total


def test_latents_are_compared_by_features_of_latents(vgg, trunk):
    metric = LatentLpips(trunk)
    torch.testing.assert_close(metric(A, B), by_hand(vgg, A, B, heads=True), rtol=1e-4, atol=1e-6)
    assert metric(A, A).tolist() == [0, 0]
    x = A.clone().requires_grad_()
    metric.train()(x, A).sum().backward()
    assert not x.grad.any() and not any(each.requires_grad for each in metric.parameters())


@pytest.mark.long
def test_the_names_of_the_authors_package_are_read(vgg, trunk, tmp_path):
    """Slices end after the layers 6, 13, 23, 33 and 43."""
    parts = {i: next(k for k, end in enumerate((6, 13, 23, 33, 43), start=1) if i <= end) for i in range(44)}
    theirs = {f"net.slice{parts[int(n.split('.')[0])]}.{n}": each for n, each in vgg.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": normal(1, width, 1, 1, seed=i).abs() for i, width in enumerate(WIDTHS)}
    save_file(theirs | heads, tmp_path / "theirs.safetensors")
    assert torch.equal(LatentLpips(tmp_path / "theirs.safetensors")(A, B), LatentLpips(trunk)(A, B))
    plain = LatentLpips(trunk, heads=False)
    torch.testing.assert_close(plain(A, B), by_hand(vgg, A, B, heads=False), rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_trunks_that_do_not_fit_are_refused(vgg, trunk, tmp_path):
    def refused(said: str, tensors: dict, **options) -> None:
        path = tmp_path / "x.safetensors"
        save_file(tensors, path)
        with pytest.raises(InputError, match=said):
            LatentLpips(path, **options)

    whole = {f"features.{name}": each for name, each in vgg.state_dict().items()}
    refused("does not contain a vgg16_bn: features.0.weight is missing", {"x": torch.ones(1)})
    refused(
        r"features.40.weight is missing", {name: each for name, each in whole.items() if name != "features.40.weight"}
    )
    refused(r"features.3.bias is \[1\], not \[64\]", whole | {"features.3.bias": torch.ones(1)})
    refused("lpips_heads=true, but lpips_path=.* has no heads", whole, heads=True)
    refused("has heads lin0 to lin4 of other shapes", whole | {f"lin{i}.weight": torch.ones(3) for i in range(5)})
    with pytest.raises(InputError, match=r"cannot be read \(.*\); give a safetensors file"):
        LatentLpips(tmp_path / "none")
    options = LpipsOptions(lpips_trunk="vgg", lpips_path=trunk, lpips_on="latents")
    codec = LatentCodec.of(write(tmp_path / "vae", autoencoder()))
    options.check_shape((4, 8, 12), "", codec)
    for shape, said in {
        (16, 8, 8): "is a trunk for latents of 4 channels, but samples have 16; give one that was trained on latents",
        (4, 3, 8): r"latents have shape \[4, 3, 8\]; LPIPS compares those of images, with sides of at least 4; remove",
        (4, 2, 8, 8): r"latents have shape \[4, 2, 8, 8\]; LPIPS compares those of images",
    }.items():
        with pytest.raises(InputError, match=said):
            options.check_shape(shape, "remove it", codec)


def test_options_without_effect_are_refused(trunk, lpips_options):
    for options, said in (
        (
            {**lpips_options, "lpips_on": "latents"},
            "lpips_on: latents needs lpips_trunk: vgg, and in lpips_path one that",
        ),
        (
            {"lpips_trunk": "vgg", "lpips_path": trunk, "lpips_on": "latents", "lpips_resize": "to_224"},
            "lpips_resize: no effect with lpips_on: latents, which are not enlarged; remove it",
        ),
    ):
        with pytest.raises(ValidationError, match=said):
            LpipsOptions(**options)
    for where in ("pixels", "latents"):
        options = {"lpips_trunk": "vgg", "lpips_path": trunk, "lpips_on": where}
        with pytest.raises(InputError, match=f"lpips_on={where} has no effect, because the teacher has no autoencoder"):
            LpipsOptions(**options).codec_of(exact.teacher(exact.FIELD, (3, 32, 32)), "remove it")
    with pytest.raises(ValidationError, match="lpips_on: no effect without lpips_trunk; give it, or remove them"):
        caf.Config(lpips_on="pixels")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("dit") / "dit", dit.pipeline(num_embeds_ada_norm=3))
    return teacher_on_linear_path(load(folder))


RECIPES = {
    "one_step": (one_step, {"distance": "lpips", "lpips_resize": "to_64"}),
    "rf_plus_plus": (rf_plus_plus, {"lpips_resize": "to_64"}),
    "slimflow": (slimflow, {"distance": "lpips", "lpips_resize": "to_64"}),
    "caf": (caf, {"lpips_resize": "to_64"}),
}


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.long) if k != "caf" else k for k in RECIPES])
def test_recipes_decode_latents_by_default(teacher, lpips_options, name):
    module, options = RECIPES[name]
    config = module.Config(**lpips_options, **options)
    recipe = module.Recipe(config, teacher)
    roles = recipe.networks(StudentInit(teacher, None, teacher.shape, 3, 0, teacher))
    metric = roles["lpips"].module
    assert isinstance(roles["lpips"], Frozen) and isinstance(metric, DecodedLpips)
    assert all(not each.requires_grad for each in metric.parameters())
    a, b = normal(2, *teacher.shape, seed=1), normal(2, *teacher.shape, seed=2)
    plain = Lpips("squeeze", lpips_options["lpips_path"], resize="to_64")
    expected = plain(teacher.codec.decode(a), teacher.codec.decode(b))
    assert torch.equal(metric(a, b), expected) and expected.min() > 0


class Line(nn.Module):
    """A student that goes from the noise to `data` in one step."""

    interpolant = linear()

    def __init__(self, data) -> None:
        super().__init__()
        self.data = data

    def forward(self, x_t, t, cond):
        return x_t - self.data


@pytest.mark.parametrize("where", ["pixels", "latents"])
def test_one_step_learns_the_data_of_its_pairs(teacher, trunk, lpips_options, where):
    options = (
        lpips_options | {"lpips_resize": "to_64"}
        if where == "pixels"
        else {"lpips_trunk": "vgg", "lpips_path": trunk, "lpips_on": where}
    )
    recipe = one_step.Recipe(one_step.Config(**options, distance="lpips"), teacher)
    metric = recipe.networks(StudentInit(teacher, None, teacher.shape, 3, 0, teacher))["lpips"].module
    assert isinstance(metric, DecodedLpips if where == "pixels" else LatentLpips)
    noise, data, other = (normal(2, *teacher.shape, seed=seed) for seed in (1, 2, 3))
    batch = Batch(None, Pairs(noise, data), {})
    right, wrong = (
        recipe.loss({"student": Line(each), "lpips": metric}, batch, exact.context(2)).total for each in (data, other)
    )
    assert right.item() <= 1e-6 < 1e-3 < wrong.item()


def test_gradients_flow_through_the_decoder_to_the_prediction(teacher, lpips_options):
    config = one_step.Config(**lpips_options, distance="lpips", lpips_resize="to_64")
    metric = config.lpips(teacher.codec)
    x, data = normal(2, *teacher.shape, seed=1).requires_grad_(), normal(2, *teacher.shape, seed=2)
    (gradient,) = torch.autograd.grad(metric(x, data).sum(), x)
    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (metric(x + sign * step, data).sum() for sign in (1, -1))
    assert ((ahead - behind) / (0.1 * gradient.norm())).item() == pytest.approx(1, abs=0.1)


def test_vectors_and_videos_have_no_lpips(lpips_options, tmp_path):
    config = caf.Config(**lpips_options)
    with pytest.raises(InputError, match=r"LPIPS compares images, but samples have shape \[3\]; remove it"):
        config.codec_of(exact.teacher(exact.FIELD), "remove it")
    codec = LatentCodec.of(write(tmp_path / "vae", autoencoder()))
    with pytest.raises(InputError, match=r"LPIPS compares images, but samples have shape \[3, 2, 16, 16\]; remove it"):
        config.check_shape((4, 2, 8, 8), "remove it", codec)
    config.check_shape((4, 32, 32), "remove it", codec)
