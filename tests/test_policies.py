"""Networks with several outputs, as flow maps: how they start, what they compute, what their configs may say."""

import json
import math

import pytest
import torch

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks.architectures import build, policy_of
from distill.networks.policies import velocity_at
from distill.networks.policy import PolicyStudent
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.spec.model import MlpSpec
from distill.students.init import StudentInit
from distill.teachers.architectures.unet import ARCHITECTURE
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import NetworkField
from distill.testing import subject

GRID = [1.0, 0.75, 0.5, 0.0]


def vp_teacher():
    """An untrained U-Net that predicts the noise, on a VP path."""
    network = build(subject.UNET, subject.SHAPE, subject.CLASSES, seed=1).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = torch.cumprod(1 - betas, 0).tolist()
    made = VelocityUNet2DModel.from_config(network.config, path="vp", prediction="epsilon", alphas_cumprod=table)
    made.load_state_dict(network.state_dict())
    return LoadedTeacher(
        field=NetworkField(made, linear(), "velocity", 1000.0),
        shape=subject.SHAPE,
        num_classes=subject.CLASSES,
        null_class=subject.CLASSES,
        digest="2" * 64,
        description="a U-Net on a VP path",
        network=made,
    )


def inputs(count=3):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, *subject.SHAPE, generator=generator), torch.rand(count, generator=generator)
    return x, t, t * torch.rand(count, generator=generator), {"class_labels": torch.arange(count)}


@pytest.mark.parametrize("teacher", [subject.unet_teacher(), vp_teacher()], ids=["linear", "vp"])
def test_each_output_starts_as_the_teachers_velocity(teacher):
    """So the average velocity is v(x_t, t), for every s. Outputs with noise lie around it."""
    x, t, s, cond = inputs()
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, seed=0, teacher=teacher)
    with torch.no_grad():
        velocity = init.velocity_field().eval()(x, t, cond)
        student = init.policy("steps", 3, GRID).eval()
        outputs = student(x, t, None, cond)
        assert outputs.shape == (3, 3, *subject.SHAPE)
        assert torch.allclose(outputs, velocity[:, None].expand_as(outputs), atol=1e-6)
        assert torch.allclose(student(x, t, s, cond), velocity, atol=1e-5)
        spread = init.policy("gaussian", 4, spread=0.1).eval()(x, t, None, cond)
    apart = (spread - velocity[:, None]).square().mean().sqrt() / velocity.square().mean().sqrt()
    assert spread.shape[1] == 9 and 0.02 < apart < 0.4 and (spread[:, 0] != spread[:, 1]).all()


def test_a_vector_policy_starts_as_its_network():
    init = StudentInit(None, MlpSpec(kind="mlp", width=16), (2,), None, seed=3)
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.8, 0.5, 0.1])
    with torch.no_grad():
        outputs = init.policy("data", 5)(x, t, None, {})
        assert torch.allclose(outputs, init.velocity_field()(x, t, {})[:, None].expand_as(outputs), atol=1e-6)


def test_a_step_over_several_intervals_is_the_mean_of_their_outputs():
    """From 1 to 0.25 over intervals of 0.25, 0.25 and half of 0.5: a third of each."""
    student = PolicyStudent(torch.nn.Identity(), policy="steps", grid=torch.tensor(GRID, dtype=torch.float64))
    outputs = torch.tensor([[3.0, 6.0, 12.0]]).reshape(1, 3, 1)
    one = torch.ones(1)
    assert student.average(outputs, torch.zeros(1, 1), one, 0.25 * one).item() == pytest.approx(7.0)
    assert student.average(outputs, torch.zeros(1, 1), one, one).item() == 3.0
    assert student.average(outputs, torch.zeros(1, 1), 0.6 * one, 0.6 * one).item() == 6.0


def test_gaussians_weigh_as_bayes_says():
    """Two Gaussians for x in two pixels: weights are of pixels, and change with x by its likelihood."""
    outputs = torch.zeros(1, 5, 1, 1, 2, dtype=torch.float64)
    r, t, x_r = 0.8, 0.5, 0.3
    outputs[0, 0], outputs[0, 1] = (x_r - 1.0) / r, (x_r + 1.0) / r  # means 1 and -1
    outputs[0, 2, 0, 0, 1] = math.log(3.0)  # in the second pixel, the first is three times as likely
    outputs[0, 4] = math.log(0.4 / r)  # std 0.4
    full, x = torch.full((1, 1, 1, 2), x_r, dtype=torch.float64), torch.full((1, 1, 1, 2), 0.2, dtype=torch.float64)
    at_r, at_t = (torch.tensor([each], dtype=torch.float64) for each in (r, t))
    v = velocity_at("gaussian", outputs, full, at_r, 0 * at_r, x, at_t)
    for pixel, prior in enumerate((0.5, 0.75)):
        # what x_t says beyond x_r about the data y: precisions and means of a Gaussian likelihood
        precision = ((1 - t) / t) ** 2 - ((1 - r) / r) ** 2
        mean = ((1 - t) / t**2 * 0.2 - (1 - r) / r**2 * x_r) / precision
        y = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
        law = (
            sum(share * (-((y - m) ** 2) / (2 * 0.16)).exp() for share, m in ((prior, 1.0), (1 - prior, -1.0)))
            * (-precision * (y - mean) ** 2 / 2).exp()
        )
        expected = (law * y).sum() / law.sum()
        assert v[0, 0, 0, pixel].item() == pytest.approx((0.2 - expected.item()) / t, abs=1e-9)


def test_a_policy_is_continued_only_with_the_same_outputs():
    x, _, _, _ = inputs()
    init = StudentInit(None, subject.UNET, subject.SHAPE, subject.CLASSES, seed=0)
    network = init.policy("steps", 3, GRID).network
    assert policy_of(network) == ("steps", 3, GRID)
    teacher = LoadedTeacher(
        field=NetworkField(network, linear(), "velocity", 1000.0), shape=subject.SHAPE, num_classes=subject.CLASSES,
        null_class=subject.CLASSES, digest="3" * 64, description="a policy", network=network,
    )  # fmt: skip
    again = StudentInit(teacher, None, subject.SHAPE, subject.CLASSES, seed=0)
    assert policy_of(again.policy("steps", 3, GRID).network) == ("steps", 3, GRID)
    for given in (("steps", 3, [1.0, 0.7, 0.5, 0.0]), ("data", 3, None), ("gaussian", 1, None)):
        with pytest.raises(InputError, match="the source is a flow map without the outputs that this recipe trains"):
            again.policy(*given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 4}, "policy=steps with 4 outputs and a grid of 4 times"),
        ({"policy": "gaussian"}, "policy=gaussian with 3 outputs and a grid of 4 times"),
        ({"policy": "gaussian", "grid": None, "out_channels": 4}, "policy=gaussian with 4 outputs"),
        ({"policy": "pickle"}, "policy='pickle'; valid: '', 'steps', 'data' or 'gaussian'"),
        ({"grid": [1.0, 0.7, 0.8, 0.0]}, r"grid=.*; valid: 2 times or more, decreasing from 1 to 0"),
        ({"policy": ""}, "policy=none with 3 outputs"),
    ],
)
def test_configs_of_policies_are_checked(changes, message, tmp_path):
    network = StudentInit(None, subject.UNET, subject.SHAPE, subject.CLASSES, seed=0).policy("steps", 3, GRID).network
    config = {**json.loads(network.to_json_string()), "sample_size": 8}
    assert ARCHITECTURE.shape(config, tmp_path) == subject.SHAPE
    with pytest.raises(InputError, match=message):
        ARCHITECTURE.shape({**config, **changes}, tmp_path)
