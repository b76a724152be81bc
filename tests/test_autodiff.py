"""Directional derivatives: known answers, the order of finite differences, and both methods on diffusers' networks."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel

from distill.flow.autodiff import jvp
from distill.flow.draws import generator
from distill.spec.model import MlpSpec, UNetSpec
from distill.students.init import StudentInit
from distill.testing import exact


def randn(name, *shape):
    return torch.randn(shape, generator=generator("autodiff", name))


def trained(network):
    """The network with all its weights away from zero: fresh ones are blind to what they were not trained on."""
    for index, parameter in enumerate(network.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator("trained", index))
    return network.eval()


@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_known_derivative(method):
    x, t = torch.tensor([[2.0, 3.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    slope = jvp(lambda x, t: x.square() * t.exp(), (x, t), (torch.ones_like(x), 2 * torch.ones_like(t)), method=method)
    assert torch.allclose(slope, (2 * x + 2 * x.square()) * math.exp(0.5), rtol=1e-7)


def test_the_error_of_central_differences_falls_with_the_square_of_their_step():
    x, t, s = exact.batch(64).data, torch.linspace(0.3, 0.9, 64).double(), torch.linspace(0.1, 0.2, 64).double()
    along = (exact.FIELD(x, t, {}), torch.ones_like(t), torch.zeros_like(t))

    def u(x, t, s):
        return exact.FLOW_MAP(x, t, s, {})

    true = jvp(u, (x, t, s), along)
    errors = [(jvp(u, (x, t, s), along, method="central", step=h) - true).abs().max() for h in (4e-3, 2e-3, 1e-3)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert (coarse / fine).item() == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_both_ways_agree_through_a_unet(attention, autocast):
    spec = UNetSpec(kind="unet", channels=[16, 24], attention=attention)
    student = trained(StudentInit(None, spec, (1, 8, 8), 10, seed=0).flow_map())
    agree(student, randn("x", 3, 1, 8, 8), autocast)


def test_both_ways_agree_through_an_mlp():
    agree(
        trained(StudentInit(None, MlpSpec(kind="mlp", width=32), (2,), 10, seed=0).flow_map()), randn("x", 3, 2), False
    )


def agree(student, x, autocast):
    t, s, cond = (
        torch.tensor([0.9, 0.5, 0.2]),
        torch.tensor([0.3, 0.4, 0.0]),
        {"class_labels": torch.tensor([0, 7, 10])},
    )

    def u(x, t, s):
        return student(x, t, s, cond)

    at, along = (x, t, s), (randn("v", *x.shape), torch.ones(3), torch.zeros(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        slope = jvp(u, at, along)
    differences = jvp(u, at, along, method="central")
    assert not slope.requires_grad and not differences.requires_grad
    assert (slope - differences).norm() < 0.02 * slope.norm()
    assert (jvp(u, at, (along[0], along[1], along[1])) - slope).norm() > 1e-3 * slope.norm()  # s counts too


def test_both_ways_agree_through_a_transformer():
    """Its attention has no forward derivative but by the mathematical formula."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, norm_num_groups=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=11,
    )  # fmt: skip
    trained(network)
    x, t, labels = randn("x", 3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0, 7, 10])

    def v(x, t):
        return network(x, timestep=1000 * t, class_labels=labels).sample

    at, along = (x, t), (randn("v", 3, 1, 8, 8), torch.ones(3))
    slope = jvp(v, at, along)
    differences = jvp(v, at, along, method="central")
    assert slope.norm() > 0 and (slope - differences).norm() < 0.02 * slope.norm()
    with pytest.raises(NotImplementedError, match="forward"):  # what fails without the guard
        torch.func.jvp(v, at, along)


def test_differences_cost_two_calls():
    calls = []

    def f(x):
        calls.append(x)
        return x.square()

    slope = jvp(f, (torch.ones(2, 3, dtype=torch.float64),), (torch.ones(2, 3, dtype=torch.float64),), method="central")
    assert len(calls) == 2 and torch.allclose(slope, torch.full((2, 3), 2.0, dtype=torch.float64))
