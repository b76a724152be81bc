"""InstaFlow (reflow sheet 3): a student of guided pairs, called without guidance, for Gaussian classes."""

import math

import pytest
import torch
from test_pairs import make
from test_recipes_reflow import Student, context

from distill.flow.draws import Rows, sample_noise
from distill.flow.times import uniform_grid
from distill.pairs import PairSet, PairSource
from distill.students.samplers import euler
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher
from recipes.reflow import one_step, reflow

MEANS, NULL, ROOT = torch.tensor([[0.7, -1.0], [2.0, 0.5]]), torch.tensor([-0.4, 0.3]), math.sqrt(0.3)
TEACHER = class_gaussian_teacher(MEANS, NULL, torch.full((2,), ROOT))
COUNT = 64


def guided_batch(folder, guidance_scale):
    """Pairs of the guided teacher as training takes them."""
    make(folder, TEACHER, steps=256, guidance_scale=guidance_scale, count=COUNT, block=COUNT, shard=COUNT)
    source = PairSource(PairSet.open(folder, TEACHER.digest), COUNT, seed=0)
    return source.batch(0, Rows(0, COUNT, COUNT))


def straight(means):
    """The student of straight paths from noise to means[class] + sqrt(lambda) noise."""

    class Straight(Student):
        def forward(self, x_t, t, cond):
            return exact.straight(means[cond["class_labels"]], ROOT)(x_t, t, cond)

    return Straight(None)


def loss(module, options, student, batch, u):
    recipe = module.Recipe(module.Config(**options), None)
    return recipe.loss({"student": student}, batch, context(COUNT, u=u)).total


@pytest.mark.parametrize("scale", [1.0, 1.5, 6.0])
def test_the_student_jumps_to_the_mean_that_guidance_shifts(tmp_path, scale):
    batch = guided_batch(tmp_path, scale)
    shifted = scale * MEANS + (1 - scale) * NULL  # m_w; of scale 1, the classes' own
    right, unguided = straight(shifted), straight(MEANS)
    for module, options in (
        (reflow, {}),
        (reflow, {"distance": "pseudo_huber"}),
        (one_step, {}),
        (one_step, {"steps": 4}),
    ):
        for u in (0.0, 0.3, 0.99):
            assert loss(module, options, right, batch, u) < 1e-6
            assert scale == 1 or loss(module, options, unguided, batch, u) > 1e-2
    noise, cond = sample_noise(5, range(8), (2,)), {"class_labels": torch.tensor([0, 1] * 4)}
    for steps in (1, 2, 4):
        samples = euler.sample(right, noise, uniform_grid(steps), cond)
        assert (samples - shifted[cond["class_labels"]] - ROOT * noise).abs().max() < 1e-5


@pytest.mark.parametrize("module", [reflow, one_step])
def test_the_fit_to_guided_pairs_is_that_student(tmp_path, module):
    """Affine in x with an offset of each class: the least squares of the recipe's own loss."""
    scale, u = 1.5, 0.4
    batch, t = guided_batch(tmp_path, scale), 1.0 if module is one_step else 0.4

    class Affine(Student):
        def forward(self, x_t, t, cond):
            return parameter[0] * x_t + parameter[1:].reshape(2, 2)[cond["class_labels"]]

    def of(given):
        nonlocal parameter
        parameter = given
        return loss(module, {}, Affine(None), batch, u)

    parameter = torch.zeros(5)
    hessian = torch.autograd.functional.hessian(of, torch.zeros(5))
    fitted = torch.linalg.solve(hessian, -torch.autograd.functional.jacobian(of, torch.zeros(5)))
    slope = (1 - ROOT) / ((1 - t) * ROOT + t)
    shifted = scale * MEANS + (1 - scale) * NULL
    assert fitted[0].item() == pytest.approx(slope, abs=1e-3)
    assert (fitted[1:].reshape(2, 2) + shifted * (1 + slope * (1 - t))).abs().max() < 1e-3
