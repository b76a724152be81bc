"""Recipe simple_reflow at its exact solution, and its parts (reflow sheet 5: T09, T10), for Gaussian data."""

import math

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import kstest
from test_recipes_reflow import ROOT, SHAPES, M, Student, context, given, loss, oracle_pairs, target, v1, v2
from test_stages import PAIRS, REFLOW, TEACH, go, spec

from distill import testing
from distill.core.errors import InputError
from distill.exchange import student_card
from distill.flow import times
from distill.flow.draws import generator
from distill.flow.interpolants import like
from distill.protocols import Batch, Pairs, Trained
from distill.runs import results
from distill.spec.model import GaussianTeacher
from distill.students.samplers import euler
from distill.teachers.analytic import gaussian_teacher
from recipes.reflow import simple_reflow
from recipes.reflow.simple_reflow import SMALL, Config, Recipe, high_pass


def randn(name, *shape):
    return torch.randn(shape, generator=generator("simple_reflow", name), dtype=torch.float64)


def made(options, function, batch, ctx):
    recipe, student = Recipe(Config(**options), None), Student(function)
    assert recipe.networks(given(student)) == {"student": Trained(student)}
    return recipe.loss({"student": student}, batch, ctx)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [None, 0.0, 3.0])
def test_loss_is_zero_at_the_straight_field_only(shape, weight):  # T07, check (b)
    batch, options = oracle_pairs(shape), {"high_pass_weight": weight}
    at_zero = made(options, v2, batch, context(shape[0]))
    assert at_zero.logs["distance"] < 1e-12 and at_zero.total < 1e-12 / SMALL
    assert made(options, v1, batch, context(shape[0])).total > 0.1


def test_each_loss_counts_the_same_and_its_own_size_is_logged():
    """Of an error of 0.1 and of 100, the loss is one; the denoiser's error is t times the velocity's."""
    batch, u = oracle_pairs((4, 3)), 0.7
    t = math.log10(1 + 9 * u)
    for size in (0.1, 100.0):
        found = made({}, lambda x, t, size=size: v2(x, t) + size, batch, context(4, u=u))
        assert found.logs["distance"].item() == pytest.approx((t * size) ** 2, rel=1e-5)
        assert found.total.item() == pytest.approx(1 / (1 + SMALL / (t * size) ** 2), rel=1e-8)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 6)])
def test_gradient_is_that_of_the_mean_of_the_logarithms(shape):  # T10, check (a)
    batch = oracle_pairs(shape)
    parameter = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def found(parameter):
        """The recipe's loss, and each sample's own."""
        ctx = context(shape[0])
        recipe, student = Recipe(Config(), None), Student(lambda x, t: v2(x, t) + parameter[0] + parameter[1] * x * x)
        total = recipe.loss({"student": student}, batch, ctx).total
        x_t, t, _ = student.seen
        error = like(t, x_t) * (batch.pairs.noise - batch.pairs.data - student.function(x_t, t))
        error = error + 10 * high_pass(error) if error.ndim == 4 else error
        return total, error.square().flatten(1).mean(1)

    found(parameter)[0].backward()
    for i, step in enumerate(1e-5 * torch.eye(2, dtype=torch.float64)):
        above, below = ((found(parameter.detach() + s)[1] + SMALL).log().mean() for s in (step, -step))
        assert parameter.grad[i].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (1, 5), (4, 6), (2, 2)])
def test_the_metric_is_invertible(size):
    """T10: phi is symmetric, and its singular values lie between 1 and 1 + weight: equal minima."""
    count = size[0] * size[1]
    matrix = high_pass(torch.eye(count, dtype=torch.float64).reshape(count, 1, *size)).reshape(count, count)
    assert (matrix - matrix.T).abs().max() < 1e-15
    assert (matrix.sum(1)).abs().max() < 1e-15, "a constant has nothing that a blur takes away"
    values = torch.linalg.svdvals(torch.eye(count, dtype=torch.float64) + 10 * matrix)
    assert values.min().item() == pytest.approx(1, abs=1e-12) and 1 <= values.max() <= 11


def test_the_high_pass_has_the_response_of_its_kernel_and_keeps_channels_apart():
    """On a wave, 1 - cos^2(a/2) cos^2(b/2): the FFT of the 3x3 binomial kernel, inside the image."""
    y, x = torch.meshgrid(torch.arange(24.0).double(), torch.arange(20.0).double(), indexing="ij")
    for a, b in ((0.0, 0.5), (1.0, 2.0), (math.pi, math.pi)):
        wave = torch.cos(a * y + b * x)
        images = torch.stack([wave, 0 * wave, -2 * wave])[None]
        gain = 1 - math.cos(a / 2) ** 2 * math.cos(b / 2) ** 2
        assert (high_pass(images) - gain * images)[:, :, 1:-1, 1:-1].abs().max() < 1e-12
        assert not high_pass(images)[:, 1].any()


def test_times_are_exponential():  # T09
    student = Student(v2)
    loss(simple_reflow, {}, student, oracle_pairs((200_000, 1)), context(200_000))
    assert kstest(student.seen[1].double().numpy(), lambda t: (10**t - 1) / 9).pvalue > 0.01


def test_forward_pairs_lie_on_the_same_straight_lines():  # check (d)
    data = M + ROOT * randn("forward", 32, 3)
    batch = Batch(None, Pairs((data - M) / ROOT, data), {})
    assert made({}, v2, batch, context(32)).logs["distance"] < 1e-12


def test_students_go_along_a_sigmoid_grid():  # check (c)
    grids = Recipe(Config(), None).t_grids(None)
    assert list(grids) == list(range(1, 17))
    noise = randn("grid", 6, 3)
    for steps, grid in grids.items():
        assert grid == times.sigmoid_grid(steps, 20.0).tolist()
        assert (
            grid[0] == 1 and grid[-1] == 0 and [t + s for t, s in zip(grid, grid[::-1], strict=True)] == [1] * len(grid)
        )
        samples = euler.sample(Student(v2), noise, torch.tensor(grid, dtype=torch.float64), {})
        assert (samples - target(noise)).abs().max() < 1e-12
    assert Recipe(Config(sharpness=None), None).t_grids(None) == {}


# --- projected pairs ---


def projected(batch, block):
    """What the student is shown, at t = 1 and t = 0: noise, data, condition."""
    student = Student(v2)
    seen = []
    for u in (1.0, 0.0):
        loss(simple_reflow, {"project_block": block}, student, batch, context(len(batch.data), u=u))
        seen.append(student.seen[0])
    return seen[0], seen[1], student.seen[2]


def test_projected_pairs_keep_the_noise_and_have_exactly_the_real_data():
    pairs, data = oracle_pairs((24, 2, 3)).pairs, randn("real", 24, 2, 3)
    noise, seen, _ = projected(Batch(data, pairs, {}), 8)
    assert torch.equal(noise, pairs.noise)
    for block in range(0, 24, 8):
        ours, theirs = seen[block : block + 8], data[block : block + 8]
        rows = [(theirs == row).flatten(1).all(1).nonzero().item() for row in ours]
        assert sorted(rows) == list(range(8))
        cost = torch.cdist(pairs.data[block : block + 8].flatten(1), theirs.flatten(1)).square()
        by_hand = cost[range(8), rows].sum()
        assert by_hand <= cost.diagonal().sum() and by_hand <= cost[range(8), rows[1:] + rows[:1]].sum()


def test_projected_pairs_of_one_dimension_are_sorted():
    """So that noise goes to the law of the real data by its quantiles: N(m', l') instead of N(m, l)."""
    count = 512
    pairs, data = oracle_pairs((count, 1)).pairs, -2 + 0.5 * randn("line", count, 1)
    noise, seen, _ = projected(Batch(data, pairs, {}), count)
    order = noise.squeeze(1).argsort()
    assert torch.equal(seen[order], data.sort(0).values)
    assert (seen - (-2 + 0.5 * noise)).square().mean().sqrt() < 0.1


def test_projected_data_brings_its_class_and_classes_stay_together():
    """Classes that lie across each other: a match of least distance alone would mix them."""
    labels, real_labels = torch.tensor([0, 1] * 8), torch.tensor([1, 1, 0, 0, 1, 0, 1, 0] + [0, 0, 1, 0, 1, 0, 0, 1])
    generated, data = randn("generated", 16, 3), randn("others", 16, 3)
    generated[labels == 0] += 5
    data[real_labels == 1] += 5  # nearest to the generated data of the other class
    batch = Batch(
        data, Pairs(randn("noise", 16, 3), generated), *({"class_labels": each} for each in (labels, real_labels))
    )
    _, seen, cond = projected(batch, 8)
    rows = [(data == row).all(1).nonzero().item() for row in seen]
    assert torch.equal(cond["class_labels"], real_labels[rows])
    assert [(cond["class_labels"] != labels)[block].sum() for block in (slice(8), slice(8, 16))] == [0, 1]  # 4, 4; 5, 3


# --- options ---


def test_options_without_sense_are_refused():
    teacher = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[M, M], std=[1, 1]))
    with pytest.raises(InputError, match=r"high_pass_weight needs images, but samples have shape \[2\]; remove it"):
        Recipe(Config(high_pass_weight=3.0), teacher)
    Recipe(Config(), teacher)
    for options, message in (
        ({"sharpness": 0}, "greater than 0"),
        ({"sharpness": 51}, "less than or equal to 50"),
        ({"project_block": 1}, "greater than or equal to 2"),
    ):
        with pytest.raises(ValidationError, match=message):
            Config(**options)
    with pytest.raises(InputError, match="a micro-batch of 6 samples is not a multiple of the block size 4"):
        projected(Batch(randn("six", 6, 3), oracle_pairs((6, 3)).pairs, {}), 4)
    assert Config().needs == {"teacher", "pairs"} and Config(project_block=8).needs == {"teacher", "pairs", "data"}
    assert (Config().rows_together, Config(project_block=8).rows_together) == (1, 8)


@pytest.mark.long
def test_all_of_it_in_one_spec(tmp_path):
    """Backward and forward pairs, projected onto real data, from a teacher's weights with less dropout."""
    pairs = {**PAIRS, "teacher": "teach"}
    student = {
        **REFLOW, "recipe": "reflow/simple_reflow", "options": {"project_block": 8}, "network": None, "dropout": 0.0,
        "teacher": "teach", "pairs": {"backward": 0.75, "forward": 0.25}, "images": 32,
    }  # fmt: skip
    evaluate = {"kind": "evaluate", "teacher": "teach", "students": {"student": [1, 16]}, "samples": 16, "block": 16}
    stages = {"teach": TEACH, "backward": pairs, "forward": {**pairs, "paths": "forward"}, "student": student}
    run = go(
        tmp_path, spec(None, {"kind": "digits"}, **stages, evaluate={**evaluate, "fine_steps": 2, "teacher_steps": [1]})
    )
    card = student_card.verify(run.student("student"))
    assert card.t_grids == {steps: times.sigmoid_grid(steps, 20.0).tolist() for steps in range(1, 17)}
    assert card.data == "digits" and results.load_results(run.stage("evaluate")).row("student", 16).nfe == 16


SUBJECTS = [
    testing.Subject(
        "reflow/simple_reflow",
        steps=(1, 2, 4),
        short=testing.Training(512_000, 256, 4e-3),  # gradients of logarithms do not shrink with the loss: more steps
        closed_form=(
            lambda: test_loss_is_zero_at_the_straight_field_only((7, 3), None),
            lambda: test_gradient_is_that_of_the_mean_of_the_logarithms((5, 2, 4, 6)),
            lambda: test_the_metric_is_invertible((4, 6)),
        ),
    ),
]
