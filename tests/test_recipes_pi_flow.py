"""Recipe pi_flow at its exact solution (sheet pretrain-tune 2.2): a mixture that is the law of the data given x_r."""

import pytest
import torch

from distill import testing
from distill.flow.draws import generator
from distill.networks.policy import PolicyStudent
from distill.protocols import Batch
from distill.spec import registry
from distill.teachers.analytic import MixtureField
from distill.testing import exact
from recipes.shortcut import pi_flow
from recipes.shortcut.pi_flow import Config, Recipe

MEANS = torch.randn(5, 3, generator=generator("pi-flow means"), dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
STD = 0.3
FIELD = MixtureField(MEANS, torch.tensor(STD, dtype=torch.float64), WEIGHTS)


def exact_outputs(x, t):
    """The law of the data given x_t = x [B, 3], as outputs [B, 11, 3]: means, weights and the logarithm of std / t."""
    t = t.double()[:, None]
    q = (1 - t).square() * STD**2 + t.square()  # [B, 1]
    apart = x[:, None] - (1 - t)[:, None] * MEANS  # [B, 5, 3]
    means = MEANS + ((1 - t) * STD**2 / q)[..., None] * apart
    weights = WEIGHTS.log() - apart.square().sum(-1) / (2 * q)
    velocities = (x[:, None] - means) / t[..., None]
    log_std = (STD / q.sqrt()).log()[..., None]
    return torch.cat([velocities, weights[..., None].expand(-1, -1, 3), log_std.expand(-1, 1, 3)], dim=1)


class Exact(torch.nn.Module):
    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x, time, s, class_labels=None):
        self.sample = exact_outputs(x, time / 1000) + self.wrong
        return self


def loss(network, policy="gaussian", count=64, **options):
    (turn,) = Recipe(Config(policy=policy, components=5, **options), exact.teacher(FIELD)).turns(0, 0)
    data = torch.randn(count, 3, generator=generator("pi-flow data"), dtype=torch.float64)
    student = PolicyStudent(network, policy=policy)
    return turn.loss({"student": student}, Batch(data, None, {}), exact.context(count)).total


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_law_of_the_data_has_no_loss(steps, dropout):  # T1
    """At every state, also at those to which policies lead that lack some of the Gaussians."""
    assert loss(Exact(), steps=steps, dropout=dropout, asked=3) < 1e-9
    assert loss(Exact(wrong=0.1), steps=steps, dropout=dropout, asked=3) > 1e-4


def test_one_call_makes_the_whole_path_of_the_teacher():
    """A mixture's path from noise to data, with an error of the midpoint rule that falls fourfold with half steps."""
    noise = torch.randn(32, 3, generator=generator("pi-flow noise"), dtype=torch.float64)
    one, zero = torch.ones(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    student, truth = PolicyStudent(Exact(), policy="gaussian"), noise
    for k in range(4096):
        t = one - (k + 0.5) / 4096
        half = truth - FIELD(truth, one - k / 4096, {}) / 8192
        truth = truth - FIELD(half, t, {}) / 4096
    outputs, errors = exact_outputs(noise, one), []
    for substeps in (16, 32, 64):
        end = student.follow(outputs, noise, one, zero, noise, one, zero, substeps)
        errors.append((end - truth).square().mean().sqrt().item())
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3 and errors[1] < 2e-3
    jump = noise - student.average(outputs, noise, one, zero)
    assert torch.allclose(jump, student.follow(outputs, noise, one, zero, noise, one, zero, 32))


def test_a_policy_of_data_ends_at_its_last_prediction():
    """dx/dt = (x - data) / t leads to the last prediction at t = 0, whatever the others are. Midpoint steps that begin
    within the last part of the grid extrapolate to it exactly.
    """
    outputs = torch.randn(16, 6, 3, generator=generator("pi-flow outputs"), dtype=torch.float64)
    x = torch.randn(16, 3, generator=generator("pi-flow x"), dtype=torch.float64)
    one, zero = torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    student = PolicyStudent(Exact(), policy="data")
    for substeps in (8, 32):
        end = student.follow(outputs, x, one, zero, x, one, zero, substeps)
        assert (end - outputs[:, -1]).abs().max() < 1e-12


def test_predictions_of_data_are_interpolated():
    """With three, at t = r, between, and at the end; on a path whose data prediction is linear in t, v is exact."""
    x, outputs = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[1.0], [3.0], [9.0]]).expand(3, 3, 2).double()
    r, end, t = (torch.tensor(each, dtype=torch.float64) for each in ([0.8] * 3, [0.4] * 3, [0.8, 0.7, 0.5]))
    v = PolicyStudent(Exact(), policy="data").velocity(outputs, x, r, end, x, t)
    assert torch.allclose(-v[:, 0] * t, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))


def test_dropout_without_gaussians_is_refused():
    with pytest.raises(Exception, match="dropout has no effect with policy: data; remove it"):
        registry.configure("shortcut/pi_flow", pi_flow, {"policy": "data", "dropout": 0.1}, "stages.s")


SUBJECTS = [
    testing.Subject(
        "shortcut/pi_flow",
        options={"components": 4, "substeps": 4},
        ring={"components": 8, "substeps": 8},
        short=testing.Training(307_200, batch_size=256, lr=2e-3),
        closed_form=(lambda: test_the_law_of_the_data_has_no_loss(1, 0.3),),
    ),
]
