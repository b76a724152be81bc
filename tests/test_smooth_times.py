"""Derivatives by the time without the ripple of its embedding."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill import testing
from distill.core.errors import InputError
from distill.flow.autodiff import ContiguousGroupNorm
from distill.flow.interpolants import linear
from distill.flow.slopes import SlopeOptions
from distill.flow.smooth_times import smooth_times, time_embeddings
from distill.networks.flow_map import FlowMapStudent
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.testing import exact
from distill.testing.subject import start

RIPPLE = 2 * math.pi * 120


class Waves(nn.Module):
    def forward(self, time):
        t = time[:, None] / 1000
        return torch.cat([torch.cos(math.pi * t), torch.sin(2 * t), torch.sin(RIPPLE * t)], dim=1)


class Embedded(nn.Module):
    """u(x, t, s) = x * (embedding of t): a smooth one, and a small ripple whose derivative is not small."""

    interpolant = linear()

    def __init__(self):
        super().__init__()
        self.time_proj, self.time_embedding = Waves(), nn.Linear(3, 3, dtype=torch.float64)
        self.time_embedding.weight.data = torch.diag(torch.tensor([1.0, 1.0, 0.02])).double()
        nn.init.zeros_(self.time_embedding.bias)

    def forward(self, x_t, t, s, cond):
        return x_t * self.time_embedding(self.time_proj(1000 * t).double()).sum(1, keepdim=True)


def derivative(network, x, t, v, method):
    return SlopeOptions(derivative=method).slope(network, x, t, 0 * t, v, {})


def test_the_ripple_is_left_out():
    network, x, t = Embedded(), exact.batch(64).data, torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    v = exact.batch(64, seed=2).data
    value = torch.cos(math.pi * t) + torch.sin(2 * t) + 0.02 * torch.sin(RIPPLE * t)
    smooth = -math.pi * torch.sin(math.pi * t) + 2 * torch.cos(2 * t)
    expected = v * value[:, None] + x * smooth[:, None]
    with torch.no_grad():
        found, exactly = (derivative(network, x, t, v, method) for method in ("smooth", "forward"))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (exactly - expected).abs().max() > 2 * expected.abs().max(), "the exact derivative is mostly ripple"


def test_values_and_other_derivatives_stay():
    recipe, init, _ = start(testing.Subject("shortcut/meanflow"))
    network = recipe.networks(init)["student"].module
    assert isinstance(network, FlowMapStudent) and len(time_embeddings(network)) == 1
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    x, v = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    t, s, cond = torch.rand(4, generator=generator), torch.zeros(4), {"class_labels": torch.arange(4)}
    one, zero = torch.ones(4), torch.zeros(4)

    def along(v, of_t, of_s):
        with sdpa_kernel(SDPBackend.MATH), ContiguousGroupNorm():
            return torch.func.jvp(lambda x, t, s: network(x, t, s, cond), (x, t, s), (v, of_t, of_s))

    with torch.no_grad():
        exactly = [along(*direction) for direction in ((v, zero, zero), (0 * v, zero, one), (0 * v, one, zero))]
        with smooth_times(network):
            smooth = [along(*direction) for direction in ((v, zero, zero), (0 * v, zero, one), (0 * v, one, zero))]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(exactly, smooth, strict=True))
    for a, b in zip(exactly[:2], smooth[:2], strict=True):
        assert torch.allclose(a[1], b[1])
    assert smooth[2][1].norm() < 0.2 * exactly[2][1].norm()
    with torch.no_grad():
        after = along(0 * v, one, zero)
    assert torch.equal(after[1], exactly[2][1]), "nothing stays behind"


def test_what_a_hook_adds_to_the_embedding_keeps_its_derivative():
    """As a TwoTimes adds that of t - s in networks such as the U-Net of Stable Diffusion."""
    network, x = Embedded(), exact.batch(64).data
    t, s = torch.linspace(0.05, 0.95, 64, dtype=torch.float64), torch.linspace(0.0, 0.5, 64, dtype=torch.float64)
    given = []
    network.time_embedding.register_forward_hook(lambda module, inputs, output: output + given[0].sin()[:, None])

    def u(s):
        given[:] = [s]
        return network(x, t, s, {})

    with torch.no_grad(), smooth_times(network):
        found = torch.func.jvp(u, (s,), (torch.ones_like(s),))[1]
    assert torch.allclose(found, 3 * x * s.cos()[:, None])  # the embedding has 3 channels, which are added up


def test_a_network_without_such_an_embedding_is_refused():
    given = SlopeOptions(derivative="smooth")
    with pytest.raises(InputError, match="derivative: smooth has no effect on this network"):
        given.checked(exact.Network(exact.FLOW_MAP))
    noise_levels = VelocityUNet2DModel(
        path="edm", prediction="epsilon", sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(InputError, match="does not embed times from 0 to 1000"):
        given.checked(noise_levels)
    assert SlopeOptions().checked(noise_levels) is noise_levels
