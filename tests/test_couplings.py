"""Couplings (reflow sheet 1, T20): each against brute force or its closed form, and flow matching with them."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distill import testing
from distill.core.errors import InputError, RunError
from distill.flow import couplings, draws, solvers
from distill.flow.draws import Rows, StepDraw
from distill.protocols import Batch
from distill.spec import registry
from distill.teachers.analytic import GaussianField
from distill.testing import exact, ring
from distill.training.engine import StepContext
from recipes.pretrain import flow_matching
from recipes.reflow import reflow

M, LAMBDA = 0.7, 0.3
MATCHED = ["ot", "ot_replacement", "immiscible"]
IN_BLOCKS = [*MATCHED, "weighted"]
ALL = ["independent", *IN_BLOCKS, "immiscible_knn"]


def sides(count, *shape, seed=0):
    """Data and noise [count, *shape], float64."""
    return tuple(
        torch.randn(count, *shape, generator=draws.generator("couplings", seed, name), dtype=torch.float64)
        for name in ("data", "noise")
    )


def uniforms(count):
    return torch.rand(count, generator=draws.generator("couplings", "u"))


def least(cost):
    """The permutation of least total cost [n, n], among all."""
    rows = range(len(cost))
    return min(itertools.permutations(rows), key=lambda order: sum(cost[i, order[i]].item() for i in rows))


# --- matchings ---


@pytest.mark.parametrize(("name", "power"), [("ot", 2), ("immiscible", 1)])
def test_an_assignment_is_the_best_of_all_permutations_in_each_block(name, power):
    data, noise = sides(24, 2, 3)
    rows, others = couplings.MATCHINGS[name](data, noise, uniforms(24), 6, None)
    assert torch.equal(rows, torch.arange(24))
    for block in range(4):
        part = slice(6 * block, 6 * block + 6)
        cost = (data[part].flatten(1)[:, None] - noise[part].flatten(1)[None]).norm(dim=2) ** power
        assert tuple((others[part] - 6 * block).tolist()) == least(cost)


@pytest.mark.parametrize("name", ["ot", "immiscible"])
@pytest.mark.parametrize("shape", [(1,), (3, 4, 4)])
def test_an_assignment_keeps_every_noise_and_costs_no_more_than_none(name, shape):
    data, noise = sides(128, *shape)
    _, others = couplings.MATCHINGS[name](data, noise, uniforms(128), 32, None)
    assert torch.equal(others.sort().values, torch.arange(128))
    power = 2 if name == "ot" else 1
    before, after = (couplings.distance(data, each).pow(power).sum() for each in (noise, noise[others]))
    assert after < before


def test_in_one_dimension_optimal_transport_pairs_in_order():
    data, noise = sides(64, 1)
    rows, others = couplings.ot(data, noise, uniforms(64), 64, None)
    assert torch.equal(noise[others][data.flatten().argsort()].flatten(), noise.flatten().sort().values)
    plan = couplings.plans(couplings.costs(data, noise, 64).square())[0]
    assert torch.equal(plan.argmax(1), others) and torch.allclose(plan.max(1).values * 64, torch.ones(64).double())


def test_distances_are_not_squares_and_their_scale_is_no_matter():
    data, noise = sides(64, 2)
    ot, immiscible, scaled = (
        function(scale * data, scale * noise, uniforms(64), 64, None)[1]
        for function, scale in ((couplings.ot, 1), (couplings.immiscible, 1), (couplings.immiscible, 0.1))
    )
    assert not torch.equal(ot, immiscible) and torch.equal(immiscible, scaled)


def test_the_plan_is_drawn_from_as_often_as_it_says():
    plan = torch.tensor([[[0.2, 0.05, 0.0], [0.0, 0.15, 0.2], [0.3, 0.0, 0.1]]], dtype=torch.float64)
    count = 3 * 20_000
    rows, others = couplings.drawn(plan.expand(count // 3, 3, 3), uniforms(count))
    found = torch.bincount(rows % 3 * 3 + others % 3, minlength=9) / count
    assert torch.equal(rows // 3, others // 3) and torch.equal(rows // 3, torch.arange(count) // 3)
    assert (found[plan.flatten() == 0] == 0).all()
    assert (found - plan.flatten()).abs().max() < 4 * math.sqrt(0.21 / count)
    ends = torch.tensor([0.0, 1 - 2**-24, 0.5])
    assert couplings.drawn(plan, ends)[0].tolist() == [0, 2, 1] and couplings.drawn(plan, ends)[1].tolist() == [0, 2, 2]


def test_pairs_drawn_from_the_optimal_plan_are_optimal_pairs():
    data, noise = sides(512, 3)
    rows, others = couplings.ot_replacement(data, noise, uniforms(512), 128, None)
    _, best = couplings.ot(data, noise, uniforms(512), 128, None)
    assert torch.equal(best[rows], others) and torch.equal(rows // 128, torch.arange(512) // 128)
    assert len(rows.unique()) / 512 == pytest.approx(1 - math.exp(-1), abs=0.05)


@pytest.mark.parametrize("name", MATCHED)
def test_within_classes_each_class_keeps_its_noise(name):
    data, noise = sides(96, 2)
    labels = draws.sample_labels(range(96), 3)
    rows, others = couplings.MATCHINGS[name](data, noise, uniforms(96), 24, labels)
    assert torch.equal(labels[rows], labels[others])
    if name != "ot_replacement":
        for label in range(3):
            mine = labels == label
            assert torch.equal(others[mine].sort().values, mine.nonzero().squeeze(1))
            _, alone = couplings.MATCHINGS[name](data[mine], noise[mine], uniforms(32), 8, None)
            assert torch.equal(noise[mine][alone], noise[others][mine]), "as if it were alone"
    _, mixed = couplings.MATCHINGS[name](data, noise, uniforms(96), 24, None)
    assert not torch.equal(labels[rows], labels[mixed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_lowers_no_cost(dtype):
    data, noise = (side.to(dtype) for side in sides(16, 50))
    with torch.autocast("cpu", torch.bfloat16):
        found = couplings.costs(data, noise, 16)[0]
    true = (data.double()[:, None] - noise.double()[None]).norm(dim=2)
    assert torch.allclose(found, true, rtol=1e-5)


def test_what_cannot_be_coupled_is_refused():
    data, noise = sides(10, 2)
    with pytest.raises(InputError, match="a micro-batch of 10 samples is not a multiple of the block size 4 "):
        couplings.ot(data, noise, uniforms(10), 4, None)
    data[3, 1] = math.nan
    with pytest.raises(RunError, match="the data or the noise to be coupled contains NaN or infinity; "):
        couplings.ot(data, noise, uniforms(10), 5, None)


# --- nearest, weights ---


def test_the_nearest_of_k_noises_is_kept():
    data, noise = sides(40, 3, 2)
    noises = torch.stack([noise, *(sides(40, 3, 2, seed=k)[1] for k in range(1, 5))])  # [k, B, ...]
    found = couplings.nearest(data, noises[0], iter(noises[1:]))
    order = (noises - data).flatten(2).norm(dim=2).argmin(0)
    assert torch.equal(found, noises[order, torch.arange(40)])


def test_weights_are_those_of_gibbs():
    cost = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 9.0, 5.0, 5.0], dtype=torch.float64)
    weights, share = couplings.gibbs_weights(cost, 4, 3.0)
    true = torch.exp(-cost / 3).reshape(2, 4)
    assert torch.allclose(weights.reshape(2, 4), true / true.mean(1, keepdim=True), rtol=1e-12)
    assert share.item() == pytest.approx((true.sum(1) ** 2 / (4 * true.square().sum(1))).mean().item(), rel=1e-12)
    equal, all_of_them = couplings.gibbs_weights(cost, 4, 1e12)
    assert torch.allclose(equal, torch.ones(8).double(), atol=1e-9) and all_of_them.item() == pytest.approx(1)
    by_median, _ = couplings.gibbs_weights(cost, 4, None)  # of each block: 1 and 5
    assert torch.equal(by_median[:4], couplings.gibbs_weights(cost[:4], 4, 2.0)[0])
    assert torch.equal(by_median[4:], couplings.gibbs_weights(cost[4:], 4, 10.0)[0])


# --- flow matching ---


class Student(nn.Module):
    """A velocity field of the linear path that remembers what it was called with."""

    interpolant = exact.Network.interpolant
    t_range = (0.0, 1.0)

    def forward(self, x_t, t, cond):
        self.seen = x_t, t, cond
        return 0 * x_t


def loss(options, network, batch, context, num_classes=None):
    recipe = flow_matching.Recipe(flow_matching.Config(**options), None)
    recipe.networks(exact.Given(network, num_classes=num_classes))
    (turn,) = recipe.turns(0, 0)
    return turn.loss({"student": network}, batch, context)


def fitted(options, data, noise, t):
    """(intercept, slope) of the affine field that minimises the recipe's loss at t."""

    def of(parameter):
        student = exact.Network(lambda x_t, t, cond: parameter[0] + parameter[1] * x_t)
        context = exact.context(len(data), normals={"noise": noise}, uniforms={"t": t})
        return loss(options, student, Batch(data, None, {}), context).total

    start = torch.zeros(2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(of, start)
    return torch.linalg.solve(hessian, -torch.autograd.functional.jacobian(of, start))


COUNT, STEPS = 4096, 16
LATENT, NOISE = sides(COUNT, 1)
DATA = M + math.sqrt(LAMBDA) * LATENT


def affine(table):
    """The field whose (intercept, slope) at i / STEPS is table[i]."""

    def field(x_t, t, cond):
        intercept, slope = table[(t * STEPS).round().long()].unbind(1)
        return intercept[:, None] + slope[:, None] * x_t

    return exact.Network(field)


@pytest.fixture(scope="module")
def fields():
    """The best affine fields for Gaussian data under each coupling."""
    times = [i / STEPS for i in range(STEPS + 1)]
    return {name: affine(torch.stack([fitted({"coupling": name}, DATA, NOISE, t) for t in times])) for name in ALL}


def sampled(field):
    """(mean, standard deviation) of an affine field's samples from N(0, 1), by Runge and Kutta's four stages."""
    x, h = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 2 / STEPS

    def v(x, t):
        return field(x, torch.full((2,), t, dtype=torch.float64), {})

    for i in range(STEPS // 2):
        t = 1 - i * h
        first = v(x, t)
        second = v(x - h / 2 * first, t - h / 2)
        third = v(x - h / 2 * second, t - h / 2)
        x = x - h / 6 * (first + 2 * second + 2 * third + v(x - h * third, t - h))
    return x.mean().item(), x.diff(dim=0).item() / 2


@pytest.mark.train
@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_law_of_the_data_where_the_marginals_are_right(name, fields):
    """The best affine field of any coupling carries the mean and variance of its noise to those of its data. From
    Gaussian noise it comes to the data's, unless the coupling has tilted either.
    """
    mean, std = sampled(fields[name])
    right_mean = DATA.mean() - DATA.std() / NOISE.std() * NOISE.mean()
    error = max(abs(mean - right_mean), abs(std - DATA.std() / NOISE.std()))
    if name in ("immiscible_knn", "weighted"):
        assert error > 0.05, "tilted, as its docstring says"
    else:
        assert error < (0.03 if name == "ot_replacement" else 1e-3)  # which leaves some samples out


@pytest.mark.train
def test_couplings_make_paths_straighter(fields):
    noise = sides(20_000, 1, seed=5)[1]
    found = {name: solvers.straightness(field, noise, {}, STEPS) for name, field in fields.items()}
    times = torch.arange(STEPS + 1, dtype=torch.float64)[:, None] / STEPS
    oracle = GaussianField(*(torch.tensor([each], dtype=torch.float64) for each in (M, math.sqrt(LAMBDA))))
    zero, one = (oracle(torch.full_like(times, x), times.flatten(), {}) for x in (0.0, 1.0))
    v1 = affine(torch.cat([zero, one - zero], dim=1))
    assert found["independent"] == pytest.approx(solvers.straightness(v1, noise, {}, STEPS), abs=0.01)  # fact (C)
    assert found["ot"] < 0.01 * found["independent"] and found["ot_replacement"] < 0.01 * found["independent"]
    for name in ("immiscible", "immiscible_knn", "weighted"):
        assert found[name] < 0.6 * found["independent"]


@pytest.mark.parametrize("t", [0.25, 0.75])
def test_optimal_transport_of_gaussians_teaches_their_straight_paths(t):
    """The wider the block, the nearer are pairs in order to (noise, m + sqrt(lambda) noise)."""
    root = DATA.std() / NOISE.std()
    mean, slope = DATA.mean() - root * NOISE.mean(), (1 - root) / ((1 - t) * root + t)
    straight = torch.stack([-mean - slope * (1 - t) * mean, slope])
    errors = [
        (fitted({"coupling": "ot", "coupling_block": block}, DATA, NOISE, t) - straight).abs().max().item()
        for block in (2, 8, 32, 128)
    ]
    assert errors[0] > 0.2 and all(finer < 0.5 * coarser for coarser, finer in itertools.pairwise(errors))


@pytest.mark.parametrize("t", [0.125, 0.5, 0.875])
def test_weights_teach_the_regression_under_the_tilted_law(t):
    count, epsilon = 400_000, 2.0
    latent, noise = sides(count, 1, seed=1)
    options = {"coupling": "weighted", "coupling_block": count, "epsilon": epsilon}
    found = fitted(options, M + math.sqrt(LAMBDA) * latent, noise, t)
    precision = [[1 / LAMBDA + 2 / epsilon, -2 / epsilon], [-2 / epsilon, 1 + 2 / epsilon]]
    law = torch.linalg.inv(torch.tensor(precision, dtype=torch.float64))
    mean = law @ torch.tensor([M / LAMBDA, 0], dtype=torch.float64)
    x_t, v = torch.tensor([[1 - t, t], [-1, 1]], dtype=torch.float64)  # rows of (data, noise)
    slope = (v @ law @ x_t) / (x_t @ law @ x_t)
    assert (found - torch.stack([v @ mean - slope * (x_t @ mean), slope])).abs().max() < 0.015


def test_weights_shrink_both_marginals():
    data, noise = sides(400_000, 1, seed=2)
    epsilon = 3.0
    weights, share = couplings.gibbs_weights(couplings.distance(data, noise).square(), 400_000, epsilon)
    variance = (1 + 2 / epsilon) / (1 + 4 / epsilon)  # below 1
    for side in (data, noise):
        assert (weights * side.flatten().square()).mean().item() == pytest.approx(variance, abs=0.01)
    exact_share = math.sqrt(1 + 8 / epsilon) / (1 + 4 / epsilon)  # E[w]^2 / E[w^2] of data - noise ~ N(0, 2)
    assert share.item() == pytest.approx(exact_share, abs=0.01)


def test_the_loss_is_weighted_by_the_cost_that_is_named():
    data, noise = sides(6, 5)
    for cost, power in (("squared", 2), ("distance", 1)):
        options = {"coupling": "weighted", "coupling_block": 3, "cost": cost, "epsilon": 4.0}
        found = loss(options, Student(), Batch(data, None, {}), exact.context(6, normals={"noise": noise}))
        weights = (-((noise - data).norm(dim=1) ** power) / 4).exp().reshape(2, 3)
        losses = (noise - data).square().mean(1).reshape(2, 3)  # of a student that says 0
        assert found.total.item() == pytest.approx(((weights * losses).sum(1) / weights.sum(1)).mean().item(), rel=1e-9)
        share = (weights.sum(1) ** 2 / (3 * weights.square().sum(1))).mean()
        assert found.logs["effective_share"].item() == pytest.approx(share.item(), rel=1e-9)


def test_one_candidate_is_independent_noise_and_more_come_nearer():
    data, _ = sides(256, 3, 4, 4)
    batch, student, lengths = Batch(data, None, {}), Student(), []
    alone = loss({}, student, batch, exact.context(256))
    x_t = student.seen[0]
    for k in (1, 2, 4, 8):
        options = {"coupling": "immiscible_knn", "candidates": k}
        found = loss(options, student, batch, exact.context(256, uniforms={"t": 1.0}))
        lengths.append(couplings.distance(data, student.seen[0]))  # at t = 1 it is the noise
        if k == 1:
            same = loss(options, student, batch, exact.context(256))
            assert torch.equal(same.total, alone.total) and torch.equal(student.seen[0], x_t)
        assert found.total == pytest.approx((lengths[-1].square().mean() / 48).item())
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(lengths))
    assert lengths[-1].mean() < 0.97 * lengths[0].mean()


@pytest.mark.parametrize("coupling", ALL)
def test_labels_stay_with_their_data(coupling):
    data, noise = sides(64, 2)
    labels = torch.arange(64)
    student = Student()
    options = {"coupling": coupling, "label_dropout": 0.0}
    context = exact.context(64, normals={"noise": noise}, uniforms={"t": 0.0})
    loss(options, student, Batch(data, None, {"class_labels": labels}), context, num_classes=64)
    x_t, _, cond = student.seen  # at t = 0 it is the data
    assert torch.equal(x_t, data[cond["class_labels"]])
    assert torch.equal(cond["class_labels"], labels) == (coupling != "ot_replacement")


@pytest.mark.parametrize("name", MATCHED)
def test_the_recipe_couples_within_classes(name):
    data, noise = sides(64, 2)
    labels = draws.sample_labels(range(64), 4)
    student = Student()
    options = {"coupling": name, "label_dropout": 0.0, "within_classes": True}
    context = exact.context(64, normals={"noise": noise}, uniforms={"t": 1.0})
    loss(options, student, Batch(data, None, {"class_labels": labels}), context, num_classes=4)
    x_t, _, cond = student.seen
    where = (x_t[:, None] == noise[None]).all(2).nonzero()[:, 1]
    assert torch.equal(labels[where], cond["class_labels"]) and not torch.equal(where, torch.arange(64))


@pytest.mark.parametrize("coupling", ALL)
def test_any_split_of_the_batch_couples_alike(coupling):
    data, _ = sides(24, 2)
    options = {"coupling": coupling} | ({"coupling_block": 4} if coupling in IN_BLOCKS else {})

    def part(start, stop):
        student = Student()
        context = StepContext(3, 0, StepDraw(0, 3, 0, Rows(start, stop, 24)), {})
        labels = {"class_labels": torch.arange(start, stop)}
        found = loss(options, student, Batch(data[start:stop], None, labels), context, num_classes=24)
        return found.total, student.seen[0], student.seen[2]["class_labels"]

    whole, x_t, labels = part(0, 24)
    for bounds in ([0, 12, 24], [0, 4, 8, 12, 16, 20, 24], [0, 8, 16, 24]):
        losses, points, classes = zip(*(part(*ends) for ends in itertools.pairwise(bounds)), strict=True)
        assert torch.equal(torch.cat(points), x_t) and torch.equal(torch.cat(classes), labels)
        assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    if coupling in IN_BLOCKS:
        with pytest.raises(InputError, match="a micro-batch of 6 samples is not a multiple of the block size 4"):
            part(0, 6)


@pytest.mark.long
@pytest.mark.process
def test_two_processes_couple_like_one(tmp_path):
    """Of one coupling: the others draw and split their batches by the same code."""
    subject = testing.Subject("pretrain/flow_matching", {"coupling": "ot_replacement", "coupling_block": 2})
    testing.agrees(subject, testing.train_together([subject], tmp_path / "pair"))


@pytest.mark.long
def test_a_student_of_optimal_transport_has_straighter_paths_on_the_ring(tmp_path):
    found = {}
    for coupling in ("independent", "ot"):
        subject = testing.Subject("pretrain/flow_matching", ring={"coupling": coupling})
        student = ring.trained(subject, subject.short, tmp_path / coupling)
        noise = sides(4096, 2, seed=3)[1].float()
        found[coupling] = solvers.straightness(student, noise, {}, 24), ring.of_field(student, "heun", 24)
    print(found)
    assert found["ot"][0] < 0.1 * found["independent"][0]
    assert found["ot"][1] < ring.of_field(ring.TEACHER.field, "euler", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coupling_block": 8},
            "coupling_block: no effect with coupling: independent; remove it, or use ot or ot_repl",
        ),
        (
            {"coupling": "immiscible_knn", "coupling_block": 8},
            "coupling_block: no effect with coupling: immiscible_knn",
        ),
        ({"coupling": "weighted", "within_classes": True}, "within_classes: no effect with coupling: weighted; remove"),
        (
            {"coupling": "ot", "candidates": 2},
            "candidates: no effect with coupling: ot; remove it, or use immiscible_k",
        ),
        ({"coupling": "ot", "epsilon": 2.0}, "epsilon: no effect with coupling: ot; remove it, or use weighted"),
        ({"cost": "squared"}, "cost: no effect with coupling: independent; remove it, or use weighted"),
        ({"coupling": "ot", "coupling_block": 1}, "greater than or equal to 2"),
        (
            {"coupling": "sinkhorn"},
            "'independent', 'ot', 'ot_replacement', 'immiscible', 'immiscible_knn' or 'weighted'",
        ),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        flow_matching.Config(**options)
    assert message in str(caught.value)


def test_within_classes_needs_classes():
    recipe = flow_matching.Recipe(flow_matching.Config(coupling="ot", within_classes=True), None)
    with pytest.raises(InputError, match="within_classes has no effect without classes; remove it, or give labelled"):
        recipe.networks(exact.Given(Student()))


def test_a_config_says_how_many_rows_belong_together():
    rows = {name: flow_matching.Config(coupling=name).rows_together for name in ALL}
    assert rows == {name: 64 if name in IN_BLOCKS else 1 for name in ALL}
    config = flow_matching.Config(coupling="weighted", coupling_block=8)
    assert config.rows_together == registry.rows_together(config) == 8
    assert registry.rows_together(reflow.Config()) == 1
