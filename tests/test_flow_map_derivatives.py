"""Derivatives of flow maps of diffusers' networks: forward mode, differences and reverse mode agree.

The networks: a U-Net, DiT, and the MMDiT of Stable Diffusion 3.
"""

from copy import deepcopy
from itertools import pairwise

import pytest
import tiny
import torch
from latent import CPU, conditions, normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.flow.autodiff import jvp
from distill.spec.model import CheckpointTeacher, UNetSpec
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers import load_teacher

T, S = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.3, 0.45, 0.0])


class InFloat64(TorchFunctionMode):
    """Computes in float64 what networks always compute in float32, such as the waves of their times.

    The rounding errors of the waves, divided by small widths, would be all that differences see.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(scope="module", params=["unet", "dit", "sd3"])
def flow_map(request, tmp_path_factory):
    """(flow map with all weights away from zero, also those of the second time; x_t; conditions)."""
    if request.param == "unet":
        spec = UNetSpec(kind="unet", channels=[16, 24], attention=True)
        student = StudentInit(None, spec, (1, 8, 8), 10, seed=0).flow_map()
        x, cond = normal(3, 1, 8, 8), {"class_labels": torch.tensor([0, 7, 10])}
    else:
        place = tiny.TINY[request.param].write(tmp_path_factory.mktemp("teacher"))
        teacher = teacher_on_linear_path(load_teacher(CheckpointTeacher(**place), CPU))
        student = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher).flow_map()
        x, cond = normal(3, *teacher.shape), conditions(teacher, 3)
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=i)
    return student.eval(), x, cond


def to(dtype, flow_map):
    """The flow map with weights of this data type as a function u(x_t, t, s), a point, and the direction (v, 1, 0).

    Point, direction and u are in float32, or in float64 with such weights.
    """
    student, x, cond = flow_map
    network = deepcopy(student).to(dtype)
    given = {name: each.to(dtype) if each.is_floating_point() else each for name, each in cond.items()}
    kind = torch.float64 if dtype == torch.float64 else torch.float32

    def u(x_t, t, s):
        return network(x_t.to(dtype), t, s, given).to(kind)

    point, v = (x.to(kind), T.to(kind), S.to(kind)), normal(*x.shape, seed=5).to(kind)
    return u, point, (v, torch.ones(3, dtype=kind), torch.zeros(3, dtype=kind))


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("time", ["first", "second"])
def test_the_error_of_central_differences_falls_with_the_square_of_their_width(flow_map, time):
    """The time of this DiT is interpolated between 1,000 noise levels: its widths do not reach from one to the next."""
    u, point, (v, one, zero) = to(torch.float64, flow_map)
    along, widths = {
        "first": ((v, one, zero), (1e-5, 5e-6, 2.5e-6)),
        "second": ((0 * v, zero, one), (4e-3, 2e-3, 1e-3)),
    }[time]
    with InFloat64():
        exactly = jvp(u, point, along)
        errors = [apart(jvp(u, point, along, method="central", step=h), exactly) for h in widths]
        assert exactly.norm() > 0.1 * u(*point).norm(), "it has an effect"
    for wide, narrow in pairwise(errors):
        assert wide / narrow == pytest.approx(4, abs=0.02)


def test_reverse_mode_finds_the_same(flow_map):
    """The gradient, by w, of the product of (v, 1, 0) and the gradient of w u: J (v, 1, 0) for every w."""
    u, point, direction = to(torch.float32, flow_map)
    at = tuple(each.requires_grad_() for each in point)
    with sdpa_kernel(SDPBackend.MATH):
        value = u(*at)
        w = torch.zeros_like(value, requires_grad=True)
        gradients = torch.autograd.grad(value, at, w, create_graph=True)
        (found,) = torch.autograd.grad(gradients, w, direction)
    assert apart(jvp(u, point, direction), found) < 1e-5


def test_derivatives_in_bf16_are_right_up_to_rounding_and_differences_are_not(flow_map):
    """A training in bf16 has weights in float32, and its derivatives leave autocast.

    Frozen weights below adapters may be in bf16, with tangents of float32 inputs. Each layer rounds to 8 bits, and the
    errors of n layers are independent: sqrt(n) / 2^8 of the derivative. Central differences divide rounding errors by
    their width if it is small, and miss the fast waves of t if it is not.
    """
    u, point, along = to(torch.float32, flow_map)
    exactly = jvp(u, point, along)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jvp(u, point, along), exactly)
    rounded, *_ = to(torch.bfloat16, flow_map)
    found, layers = jvp(rounded, point, along), [each for each in flow_map[0].modules() if not [*each.children()]]
    assert found.dtype == torch.float32
    assert 1e-4 < apart(found, exactly) < len(layers) ** 0.5 / 2**8
    for h in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5):
        assert apart(jvp(rounded, point, along, method="central", step=h), exactly) > 3 * apart(found, exactly)
